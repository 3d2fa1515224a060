"""`python -m megavila` is the `megavila` command, which torchrun needs: torchrun … -m megavila score …"""

from megavila.cli.main import main

main()
