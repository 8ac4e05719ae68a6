"""A crontab: each line's schedule is taken as it is, its command becomes `params.command` (crontab(5))."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

from worker.features.importing.entries import Import, NotTaken, zone_of
from worker.model.definitions import NICKNAMES

_VARIABLE = re.compile(r"""(["']?)([A-Za-z_]\w*)\1\s*=\s*(.*)""")
# The header of /etc/crontab and of files in /etc/cron.d, which have the user before the command.
_HEADER_WITH_USER = re.compile(r"^\s*#.*\buser(-?name)?\s+command\b", re.IGNORECASE | re.MULTILINE)
_USER = re.compile(r"[a-z_][a-z0-9_-]*\$?")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
# Programs that run the program named after them, and the number of operands before its name.
_WRAPPERS = {
    **dict.fromkeys(("bash", "dash", "sh", "zsh", "node", "perl", "php", "python", "python3", "ruby"), 0),
    **dict.fromkeys(("env", "exec", "nice", "ionice", "nohup", "sudo", "time", "timeout", "chronic"), 0),
    "systemd-cat": 0,
    "flock": 1,
}
_PREPARING = ("cd", "test", "[", ".", "source")
# Variables that are not taken over, and why.
_UNUSED = {
    "MAILTO": "a run keeps its log, and [alerts] reports failures",
    "TZ": "it sets the zone of the command, not of the schedule (CRON_TZ does)",
}
_OPERATORS = ("&&", "||", ";", "|", "&")
# A backslash escapes what follows it: after two of them, a percent sign ends the command.
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_WITHOUT_INPUT = re.compile(r"(?:[^\\%]|\\.|\\$)*", re.DOTALL)
_NUMBER = re.compile(r"\d+(\.\d+)?[smhd]?")
# Without digits, as secrets have them.
_VERB = re.compile(r"[A-Za-z][A-Za-z_:-]{0,30}")


def has_user_column(text: str, path: str) -> bool:
    """Whether the lines have a user before the command, by the file's place or the usual header."""
    place = PurePosixPath(path)
    return (
        str(place) == "/etc/crontab" or place.parent.name == "cron.d" or bool(_HEADER_WITH_USER.search(text))
    )


def read_crontab(text: str, imported: Import, *, with_user: bool) -> None:
    """Add a definition for each line that has a command, and remarks for the rest."""
    # None if a line named a zone that does not exist.
    zone: str | None = imported.zone
    zone_problem = ""
    users: set[str] = set()
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        variable = _VARIABLE.fullmatch(line)
        if variable is not None:
            name, value = variable[2], _unquoted(variable[3])
            if name == "CRON_TZ":
                zone, zone_problem = _zone(value, imported.zone)
                if zone_problem:
                    imported.note(number, name, zone_problem)
            else:
                reason = _UNUSED.get(name, "the handler sets the command's environment")
                imported.note(number, name, f"not taken over: {reason}")
            continue
        with imported.entry(number, ""):
            schedule, rest = _split(line)
            if with_user:
                user, rest = _first_word(rest)
                if not _USER.fullmatch(user) or not rest:
                    raise NotTaken("it has no user and command; without a user column: --no-user-column")
                if user not in users:
                    users.add(user)
                    imported.note(number, "", f"the user {user} is not taken over: runs have the worker's")
            command = _command(rest)
            if zone_problem:
                raise NotTaken(zone_problem)
            values = {"handler": imported.handler, "schedule": schedule, "timezone": zone}
            if schedule in NICKNAMES:
                # Such schedules are spread over up to an hour by default; cron starts them on time.
                values["spread"] = "off"
            imported.add(number, _name(command), {**values, "params": {"command": command}}, label="")
    if any("timezone" not in entry for entry in imported.definitions):
        why = "cron follows the zone of its machine, which the crontab does not name"
        imported.note_zone(why, "these definitions")


def _split(line: str) -> tuple[str, str]:
    """The schedule, and the rest of the line."""
    if line.startswith("@"):
        word, rest = _first_word(line)
        if word == "@reboot":
            raise NotTaken("@reboot has no time; start such a program with the system's service manager")
        if word not in NICKNAMES:
            raise NotTaken(f"{word} is not one of {', '.join(NICKNAMES)}")
        return word, rest
    fields = line.split(None, 5)
    return " ".join(fields[:5]), "".join(fields[5:])


def _first_word(text: str) -> tuple[str, str]:
    word, *rest = text.split(None, 1)[:2] or [""]
    return word, rest[0] if rest else ""


def _command(text: str) -> str:
    """The command as cron passes it to the shell: `\\%` is a percent sign."""
    if not text:
        raise NotTaken("it has no command")
    if not _WITHOUT_INPUT.fullmatch(text):
        raise NotTaken(
            "what follows a % is standard input, which a handler does not get; \\% is a percent sign"
        )
    return _ESCAPED.sub(lambda found: "%" if found[0] == "\\%" else found[0], text)


def _zone(value: str, usual: str | None) -> tuple[str | None, str]:
    if not value:
        return usual, ""
    try:
        zone_of(value)
    except NotTaken as error:
        return None, f"CRON_TZ: {error}"
    return value, ""


def _unquoted(value: str) -> str:
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def _name(command: str) -> str:
    """A name from a command's first program: `nice /opt/backup.sh daily -v` is `backup-daily`."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    operands = 0
    while words:
        word, *words = words
        if word in _PREPARING:
            # What precedes the first operator only prepares the command.
            while words and words[0] not in _OPERATORS:
                words.pop(0)
        elif word in _OPERATORS or word.startswith("-") or _ASSIGNMENT.match(word) or _NUMBER.fullmatch(word):
            continue
        elif operands:
            operands -= 1
        elif (program := PurePosixPath(word).name) in _WRAPPERS:
            operands = _WRAPPERS[program]
        else:
            stem = program.rsplit(".", 1)[0] or program
            verb = f"-{words[0]}" if words and _VERB.fullmatch(words[0]) else ""
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem + verb).strip("-.")[:60]
            if name:
                return name
    return "command"
