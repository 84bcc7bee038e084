"""python -m nestlearn"""

from nestlearn.cli import main

main()
