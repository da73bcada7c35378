"""Import this first: the script `store.py` in this folder must not stand in for the package `store`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
sys.path.append(str(Path(__file__).parent))
