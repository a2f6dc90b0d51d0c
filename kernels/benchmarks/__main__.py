"""``python -m benchmarks``: the benchmark by itself, with torch, triton and ``wmtp_kernels`` alone."""

import sys

from .options import UsageError, parse


def main(arguments: list[str] | None = None) -> int:
    """Run it. Exit codes: 0 done, 1 a target was missed (with ``--check``), 2 wrong usage, 130 interrupted."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    from .run import run

    try:
        return run(settings, "python -m benchmarks")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
