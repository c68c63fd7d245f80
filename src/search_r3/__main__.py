"""`python -m search_r3` is the `search-r3` command."""

from search_r3.cli import main

main()
