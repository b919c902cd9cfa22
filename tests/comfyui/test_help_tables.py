"""The input tables of the help pages say what the node schemas say, in every language."""

from dataclasses import dataclass, field

import pytest
from comfy_api.latest import io
from host.find import PACK

from tools.help_tables import WORDS, in_step, number, pages

PAGE = """# A page

## Inputs

| input | meaning |
|---|---|
| `gone` | was here |
| `mode` | how |
| `low`, `high` | the ends |

Prose stays.
"""
TABLE = """# A page

## Inputs

| input | range, **default** | meaning |
|---|---|---|
| `mode` | **plain** · shifted | how |
| `shift` | shifted: **3**; 0.5 to 100 | Where to, \\|t\\|. |
| `low`, `high` | `low`: **0**; 0 to 999<br>`high`: **1000**; 1 to 1000 | the ends |
| `model` | optional | A model. |

Prose stays.
"""


@dataclass
class Schema:
    """What a table is made from."""

    inputs: list = field(default_factory=list)


def schema() -> Schema:
    shift = io.Float.Input("shift", default=3.0, min=0.5, max=100, tooltip="Where to, |t|.")
    options = [io.DynamicCombo.Option("plain", []), io.DynamicCombo.Option("shifted", [shift])]
    return Schema(
        [
            io.DynamicCombo.Input("mode", options=options, tooltip="How."),
            io.Int.Input("low", default=0, min=0, max=999, tooltip="Low."),
            io.Int.Input("high", default=1000, min=1, max=1000, tooltip="High."),
            io.Model.Input("model", optional=True, tooltip="A model."),
        ]
    )


TEXTS = {
    key: {"name": name, "tooltip": tooltip}
    for key, name, tooltip in (
        ("mode", "mode", "How."),
        ("mode_shift", "shift", "Where to, |t|."),
        ("low", "low", "Low."),
        ("high", "high", "High."),
        ("model", "model", "A model."),
    )
}


@pytest.fixture(scope="module")
def of_every_page():
    return list(pages())


def test_every_page_has_the_inputs_of_its_node(of_every_page):
    """`make help-tables` writes them."""
    stale = [str(path.relative_to(PACK)) for path, page, made in of_every_page if made != page]
    assert stale == []


def test_a_table_keeps_what_was_written_learns_what_is_new_and_drops_what_is_gone():
    made = in_step(PAGE, schema(), "en", TEXTS)
    assert made == TABLE
    assert in_step(made, schema(), "en", TEXTS) == made


@pytest.mark.parametrize("change", [{"default": 4.0}, {"min": 0.25}, {"max": 50}])
def test_a_changed_default_or_bound_changes_the_table(change):
    changed = schema()
    for name, value in change.items():
        setattr(changed.inputs[0].options[1].inputs[0], name, value)
    assert in_step(TABLE, changed, "en", TEXTS) != TABLE


def test_a_translated_page_has_the_labels_that_its_nodes_show():
    texts = TEXTS | {"mode": {"name": "方法", "tooltip": "怎样。"}}
    made = in_step(PAGE.replace("| input |", "| 输入 |"), schema(), "zh", texts)
    assert "| `mode`（方法） | **plain** · shifted | how |" in made
    assert WORDS["zh"].range in made


def test_a_page_without_a_table_is_told():
    with pytest.raises(ValueError, match="no input table"):
        in_step("# A page\n", schema(), "en", TEXTS)


def test_numbers_are_written_as_people_write_them():
    values = (1_000_000, 0.0001, 1e-9, -0.5, 2**64 - 1, 2**31 - 1, 1024.0, 999, 65535, 0.0)
    assert [number(value).replace("\N{NO-BREAK SPACE}", " ") for value in values] == [
        "1 000 000",
        "0.0001",
        "1e-9",
        "−0.5",
        "2⁶⁴ − 1",
        "2³¹ − 1",
        "1024",
        "999",
        "65 535",
        "0",
    ]
