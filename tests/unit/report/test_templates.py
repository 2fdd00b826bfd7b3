"""Templates and the types of the page agree: checked in every branch, without rendering."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from typing import get_args

from jinja2 import DictLoader

from fedsgcg.server.report.build import CONSTANTS, template_environment
from fedsgcg.server.report.sections.page import Page
from tests.support.template_types import TemplateTypes, hints_of

TAG = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
ATTRIBUTE = re.compile(r"""(?P<text>"[^"]*"|'[^']*')|(?<=[\w\])}])\.[a-z][a-z0-9_]*""")


def sources():
    environment = template_environment()
    assert environment.loader is not None
    return {
        name: environment.loader.get_source(environment, name)[0]
        for name in environment.list_templates(extensions=["j2"])
    }


def checked(templates):
    environment = template_environment()
    environment.loader = DictLoader(templates)
    found = TemplateTypes(environment, hints_of(Page) | CONSTANTS)
    found.check("page.html.j2")
    return found


def attributes(source):
    """Where the name of an attribute ends in the source of a template."""
    return [
        tag.start() + match.end()
        for tag in TAG.finditer(source)
        for match in ATTRIBUTE.finditer(tag[0])
        if not match["text"]
    ]


def reachable(kind, found):
    """The dataclasses of the sections that a type contains."""
    if is_dataclass(kind) and kind not in found and ".report.sections." in kind.__module__:
        found.add(kind)
        for part in hints_of(kind).values():
            reachable(part, found)
    for part in get_args(kind):
        reachable(part, found)
    return found


def test_every_attribute_that_a_template_reads_exists():
    assert checked(sources()).faults == []


def test_every_misspelled_attribute_is_found():
    templates = sources()
    places = [(name, end) for name, text in templates.items() for end in attributes(text)]
    assert len(places) > 200
    missed = []
    for name, end in places:
        text = templates[name]
        if not checked(templates | {name: f"{text[:end]}_{text[end:]}"}).faults:
            missed.append(f"{name}: {text[end - 40 : end]}")
    assert missed == []


def test_a_name_that_is_not_part_of_the_page_is_found():
    templates = sources()
    templates["header.html.j2"] += "{% if problem %}{{ overview.title }}{% endif %}"
    assert [fault.rpartition(" ")[2] for fault in checked(templates).faults] == ["`problem`"]


def test_every_field_is_shown():
    found = checked(sources())
    names = {
        (kind.__name__, name)
        for kind in reachable(Page, set()) - {Page}
        for name in kind.__annotations__
    }
    assert names - found.read == {("OverlayBlock", "sheet")}  # only a file, not on the page
