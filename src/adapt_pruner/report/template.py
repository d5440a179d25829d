"""Pages from the files in templates/, which say what they look like; whatever is put into them is escaped."""

import base64
import os
import re
import time
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adapt_pruner.core.events.words import duration, shown
from adapt_pruner.core.system.files import PAGE_FOOT
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.report.svg import drawing

_ABSOLUTE = re.compile(r"(?<![\w.~*/-])/(?:[^\s'\",:/]+/)+(?=[^\s'\",:/])")


@cache
def environment() -> Environment:
    """The templates, with the filters that they use; a name that is missing is an error."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "base64": lambda text: base64.b64encode(text.encode()).decode(), "darker": _darker, "drawing": drawing, "duration": duration, "json": to_json, "percent": "{:.2%}".format, "placeless": placeless, "shown": shown,
    }  # fmt: skip
    return made


def rendered(template: str, /, **values: object) -> str:
    """The text of a page from its template."""
    written = f"{PAGE_FOOT} on {time.strftime('%Y-%m-%d %H:%M')}"
    return environment().get_template(template).render(written=written, **values)


def _darker(colour: str) -> str:
    """#rrggbb, for thin letters."""
    return "#" + "".join(f"{int(0.7 * int(colour[at : at + 2], 16)):02x}" for at in (1, 3, 5))


def placeless(text: object) -> str:
    """Text without folders of this machine: absolute paths become `FOLDER/notes.txt`, paths in the working directory relative."""
    return _ABSOLUTE.sub("FOLDER/", str(text).replace(f"{Path.cwd()}{os.sep}", ""))
