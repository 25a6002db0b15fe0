"""`python -m tokenflow_batch`: what launchers of several processes start."""

from tokenflow_batch.cli import main

main()
