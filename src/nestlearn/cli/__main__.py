"""python -m nestlearn.cli"""

from nestlearn.cli import main

main()
