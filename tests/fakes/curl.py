"""The `curl` of the pages where the machine has none: `python curl.py`, with the options that they use."""

from __future__ import annotations

import argparse
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

# Exit codes of curl.
REFUSED = 7
NOT_FOUND = 22


def install(folder: Path) -> None:
    """Put a `curl` into a folder of PATH, unless this machine has one."""
    if shutil.which("curl") is None:
        made = folder / "curl"
        made.write_text(script())
        made.chmod(0o755)


def script() -> str:
    """The command, for this Python."""
    return f'#!/bin/sh\nexec {Path(sys.executable).resolve()} -IS {Path(__file__).resolve()} "$@"\n'


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="curl", allow_abbrev=False)
    for name in ("-s", "-S", "-N"):
        made.add_argument(name, action="store_true")
    made.add_argument("-f", "--fail", action="store_true")
    made.add_argument("-H", dest="headers", action="append", default=[])
    made.add_argument("-d", dest="data")
    made.add_argument("-X", dest="method")
    made.add_argument("-b", dest="cookies")
    made.add_argument("-w", dest="after", default="")
    made.add_argument("urls", nargs="+")
    return made


def cookies_of(text: str) -> str:
    """The header of `NAME=VALUE`, or of a file in Netscape's format."""
    if "=" in text:
        return text
    rows = (line.split("\t") for line in Path(text).read_text().splitlines())
    return "; ".join(f"{row[5]}={row[6]}" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    headers = dict(text.split(": ", 1) for text in options.headers)
    if options.cookies:
        headers["Cookie"] = cookies_of(options.cookies)
    data = options.data
    if data == "@-":
        data = sys.stdin.read().replace("\n", "")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    code = 0
    for url in options.urls:
        body = None if data is None else data.encode()
        request = urllib.request.Request(url, data=body, headers=headers, method=options.method)
        try:
            answer = direct.open(request)
        except urllib.error.HTTPError as error:
            if options.fail:
                print(f"curl: (22) The requested URL returned error: {error.code}", file=sys.stderr)
                code = NOT_FOUND
                continue
            answer = error
        except OSError as error:
            print(f"curl: (7) {error}", file=sys.stderr)
            code = REFUSED
            continue
        with answer:
            # An event of a stream is printed as it comes.
            while part := answer.read1():
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
        sys.stdout.write(options.after.replace("\\n", "\n"))
        sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
