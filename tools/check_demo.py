"""Check the results of the demo against what the README promises: `python
tools/check_demo.py out`.
"""

import json
import sys
from pathlib import Path


def problems(folder: Path) -> list[str]:
    """One line for each result in `folder` that is not as promised."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before = summary["perplexity_before"]
    after = summary["perplexity_after"]
    checks = [
        (
            after["code"] > 0.4 * before["code"],
            f"perplexity on code fell only from {before['code']:.2f} to {after['code']:.2f}",
        ),
        (
            after["prose"] > 1.1 * before["prose"],
            f"perplexity on prose rose from {before['prose']:.2f} to {after['prose']:.2f}",
        ),
        (
            summary["base_bytes_gathered"] != 0,
            f"{summary['base_bytes_gathered']} bytes of the base were communicated",
        ),
        (summary["merges"] < 2, f"{summary['merges']} merges"),
        (not (folder / "merged" / "config.json").is_file(), "no merged model"),
    ]
    return [message for wrong, message in checks if wrong]


def main() -> int:
    messages = problems(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
    print("\n".join(messages) or "as promised")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
