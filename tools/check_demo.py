"""Check the results of the demo against what the README promises:
`python tools/check_demo.py out`."""

import json
import sys
from pathlib import Path


def broken_promises(folder: Path) -> list[str]:
    """One line for each result in `folder` that is not as promised."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before = summary["perplexity_before"]
    after = summary["perplexity_after"]
    code = after["code"] / before["code"]
    prose = after["prose"] / before["prose"]
    sent = summary["base_bytes_gathered"]
    merges = summary["merges"]
    promises = {
        f"perplexity on code falls to 40% of what it was, or less: {code:.0%}": code
        <= 0.4,
        f"perplexity on prose rises to 110% at most: {prose:.0%}": prose <= 1.1,
        f"no byte of the base is communicated: {sent}": sent == 0,
        f"there are two merges or more: {merges}": merges >= 2,
        "there is a merged model": (folder / "merged" / "config.json").is_file(),
    }
    return [promise for promise, is_true in promises.items() if not is_true]


def main() -> None:
    broken = broken_promises(Path(sys.argv[1]))
    for promise in broken:
        print(f"not as promised: {promise}")
    sys.exit(len(broken) > 0)


if __name__ == "__main__":
    main()
