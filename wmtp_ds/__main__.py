"""``python -m wmtp_ds`` is the same program as ``wmtp-ds``."""

from wmtp_ds.cli.main import main

if __name__ == "__main__":
    main()
