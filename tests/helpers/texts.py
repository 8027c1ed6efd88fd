"""Contents of files of text."""

import json


def json_lines(texts):
    """A JSON object a line for each text."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
