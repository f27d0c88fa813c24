"""``python -m sku``."""

from sku.cli.main import main

if __name__ == "__main__":
    main()
