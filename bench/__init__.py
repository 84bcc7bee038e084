"""Speed and memory, measured: `python -m bench` from the repository's root (see --help)."""
