"""`python -m tests.documentation [PAGE ...]`: runs the documentation's commands and tells what became of each."""

import sys

from tests.documentation.checkout import run_source, session
from tests.documentation.sources import names


def main(chosen: list[str]) -> int:
    """All pages where none is chosen. Returns: 1 where a command failed."""
    failed, cpu_seconds = 0, 0.0
    with session() as made:
        for name in chosen or names():
            for result in run_source(name, made):
                print(result, flush=True)
                cpu_seconds += sum(record["cpu_seconds"] for record in result.records)
                if result.outcome == "failed":
                    failed += 1
                    print(result.output[-3000:], flush=True)
    print(f"{failed} failed; {cpu_seconds:.0f} s of processor time in python")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
