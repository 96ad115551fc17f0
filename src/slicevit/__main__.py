"""python -m slicevit"""

from slicevit.cli import main

main()
