"""Let ``python -m sws_dist COMMAND`` be ``sws COMMAND``."""

from sws_dist.cli.main import main

main()
