"""The formats in which models write tool calls, each declared once: what marks a call, and the shape behind the mark.

A row gives the parser, its stream, the special tokens that must stay in the text, and the frame in which a grammar puts
the arguments. A format that fits no shape has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fuseline.api.parsers.calls import CallSink, hex_id, nine_letters, written_id
from fuseline.api.parsers.gemma import Gemma
from fuseline.api.parsers.mistral import read_mistral
from fuseline.api.parsers.pythonic import Pythonic
from fuseline.api.parsers.shapes import MAX_NAME, Headed, Read, Tagged, read_call, read_calls
from fuseline.api.parsers.source import CutShort, NotACall, Reading, Source, markers

IDS = {"hex": hex_id, "nine": nine_letters, "written": written_id}


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written."""

    names: tuple[str, ...]
    """Values of --tool-call-parser."""
    read: Read
    """Reads what follows one of `opens`."""
    opens: tuple[str, ...] = ()
    """Texts that begin a call, or several."""
    groups: tuple[str, ...] = ()
    """Texts behind which a call must begin."""
    ends: tuple[str, ...] = ()
    """Texts behind calls."""
    bare: str = ""
    """First characters with which the whole output may be calls without any mark before them; "a" is a letter."""
    is_first: bool = False
    """Calls are the whole output, or there are none."""
    is_single: bool = False
    """One call only."""
    needs_known: bool = False
    """A name that is not among the tools is no call."""
    tokens: tuple[str, ...] = ()
    """Marks that must be tokens of the vocabulary."""
    ids: Literal["hex", "nine", "written"] = "hex"
    frame: tuple[str, str] = ("", "")
    """Text before and behind the arguments of a call to {name}, where arguments are JSON."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that must reach the parser, special tokens or not."""
        own = getattr(self.read, "own_markers", ())
        return tuple(dict.fromkeys((*self.opens, *self.groups, *self.ends, *own)))

    def takes_name(self, name: str) -> bool:
        """Whether the parser reads calls of a function of that name."""
        takes = getattr(self.read, "takes_name", None)
        return len(name) <= MAX_NAME and (takes is None or takes(name))


def read_output(source: Source, sink: CallSink, form: ToolFormat) -> Reading[None]:
    """One choice's text from its beginning to its end."""
    source.record()
    letter = yield from source.blanks()
    blanks = source.recorded()
    found = markers(*form.opens, *form.groups) if form.opens else None
    if form.bare and letter and letter in form.bare:
        mark = (yield from source.goes_on_with(found)) if found else None
        yield from _attempt(source, sink, form, mark or "", blanks + (mark or ""))
    else:
        sink.text(blanks)
    if form.is_first and found and not sink.num_calls and not sink.has_content:
        if mark := (yield from source.goes_on_with(found)):
            yield from _attempt(source, sink, form, mark, mark)
    if found is None or form.is_first:
        yield from _rest(source, sink)
        return
    while (mark := (yield from source.until(found, sink.text))) is not None:
        yield from _attempt(source, sink, form, mark, mark)


def _attempt(source: Source, sink: CallSink, form: ToolFormat, mark: str, before: str) -> Reading[None]:
    """Read calls behind `mark`; what proves to be none is content."""
    source.record(before)
    try:
        while mark in form.groups:
            yield from source.need_after_blanks()
            mark = yield from source.goes_on_with(markers(*form.opens, *form.groups))
            if mark is None:
                raise NotACall
        yield from form.read(source, sink)
        source.recorded()
    except NotACall as error:
        sink.fail(source.recorded(), isinstance(error, CutShort))


def _rest(source: Source, sink: CallSink) -> Reading[None]:
    while (yield from source.peek()):
        sink.text(source.take(len(source.rest)))


def read_required(source: Source, sink: CallSink) -> Reading[None]:
    """The list of calls that tool_choice required asks for."""
    yield from read_output(source, sink, REQUIRED)


XML = Tagged(
    name_ends=(">",), key_opens="<parameter=", key_ends=">", value_ends="</parameter>", closes="</function>"
)  # fmt: skip
GLM = Tagged(
    name_ends=("\n", "<arg_key>", "</tool_call>"), key_opens="<arg_key>", key_ends="</arg_key>",
    value_opens="<arg_value>", value_ends="</arg_value>", closes="</tool_call>",
)  # fmt: skip
INVOKE = Tagged(
    name_ends=('">',), key_opens='<parameter name="', key_ends='">', value_ends="</parameter>", closes="</invoke>"
)  # fmt: skip
STEP = Tagged(
    name_ends=('">',), key_opens='<steptml:parameter name="', key_ends='">', value_ends="</steptml:parameter>",
    closes="</steptml:invoke>",
)  # fmt: skip
OBJECT = ('{"name": "{name}", "arguments": ', "}")
LLAMA = ('{"name": "{name}", "parameters": ', "}")


def _framed(before: str, inner: tuple[str, str], behind: str) -> tuple[str, str]:
    return before + inner[0], inner[1] + behind


REQUIRED = ToolFormat((), read_calls, bare="[{", is_first=True)
FORMATS = (
    # The eight of the reference's first generation.
    ToolFormat(
        ("hermes", "granite4", "ernie45"), read_calls, opens=("<tool_call>",), ends=("</tool_call>",),
        frame=_framed("<tool_call>\n", OBJECT, "\n</tool_call>"),
    ),
    ToolFormat(
        ("mistral",), read_mistral, opens=("[TOOL_CALLS]",), tokens=("[TOOL_CALLS]",), ids="nine",
        frame=_framed("[TOOL_CALLS][", OBJECT, "]")
    ),
    ToolFormat(
        ("llama3_json", "llama4_json"), read_calls, opens=("<|python_tag|>",), bare="{", is_first=True, frame=LLAMA
    ),
    ToolFormat(("pythonic",), Pythonic(), bare="[", is_first=True),
    ToolFormat(
        ("granite",), read_calls, opens=("<|tool_call|>", "<tool_call>"), bare="[", is_first=True,
        frame=_framed("<|tool_call|>[", OBJECT, "]"),
    ),
    ToolFormat(
        ("granite-20b-fc",), read_call, opens=("<function_call>",), frame=_framed("<function_call> ", OBJECT, "")
    ),
    ToolFormat(
        ("internlm",), read_calls, opens=("<|action_start|><|plugin|>",), ends=("<|action_end|>",), is_single=True,
        needs_known=True, frame=_framed("<|action_start|><|plugin|>", LLAMA, "<|action_end|>"),
    ),
    ToolFormat(
        ("jamba", "hunyuan_a13b", "minimax"), read_calls, opens=("<tool_calls>",), ends=("</tool_calls>",),
        frame=_framed("<tool_calls>[", OBJECT, "]</tool_calls>"),
    ),
    # Later ones.
    ToolFormat(
        ("llama4_pythonic",), Pythonic(), opens=("<|python_start|>",), ends=("<|python_end|>",), bare="[", is_first=True
    ),
    ToolFormat(("olmo3",), Pythonic(is_list=False), opens=("<function_calls>",), ends=("</function_calls>",)),
    ToolFormat(("lfm2",), Pythonic(), opens=("<|tool_call_start|>",), ends=("<|tool_call_end|>",)),
    ToolFormat(
        ("qwen3_coder", "qwen3_xml", "nemotron_v3", "step3p5"), XML, opens=("<function=",), groups=("<tool_call>",),
        ends=("</tool_call>",),
    ),
    ToolFormat(
        ("seed_oss",), XML, opens=("<function=",), groups=("<seed:tool_call>",), ends=("</seed:tool_call>",)
    ),
    ToolFormat(("glm45", "glm47"), GLM, opens=("<tool_call>",)),
    ToolFormat(
        ("minimax_m2",), INVOKE, opens=('<invoke name="',), groups=("<minimax:tool_call>",),
        ends=("</minimax:tool_call>",),
    ),
    ToolFormat(
        ("step3",), STEP, opens=('function<｜tool_sep｜><steptml:invoke name="',),
        groups=("<｜tool_calls_begin｜>", "<｜tool_call_begin｜>"),
        ends=("<｜tool_call_end｜>", "<｜tool_calls_end｜>"),
    ),
    ToolFormat(
        ("deepseek_v3",), Headed(("\n```json\n",), name_after="<｜tool▁sep｜>"), opens=("<｜tool▁call▁begin｜>",),
        groups=("<｜tool▁calls▁begin｜>",), ends=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        frame=(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    ),
    ToolFormat(
        ("deepseek_v31",), Headed(("<｜tool▁sep｜>",)), opens=("<｜tool▁call▁begin｜>",),
        groups=("<｜tool▁calls▁begin｜>",), ends=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        frame=(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    ),
    ToolFormat(
        ("kimi_k2",), Headed(("<|tool_call_argument_begin|>",), has_number=True), opens=("<|tool_call_begin|>",),
        groups=("<|tool_calls_section_begin|>",), ends=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
        ids="written",
        frame=(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
    ),
    ToolFormat(
        ("xlam",), read_calls, opens=("<tool_call>", "[TOOL_CALLS]", "```json"), ends=("</tool_call>",), bare="[",
        frame=_framed("[", OBJECT, "]"),
    ),
    ToolFormat(("phi4_mini_json",), read_calls, opens=("functools",), frame=_framed("functools[", OBJECT, "]")),
    ToolFormat(
        ("longcat",), read_calls, opens=("<longcat_tool_call>",), ends=("</longcat_tool_call>",),
        frame=_framed("<longcat_tool_call>", OBJECT, "</longcat_tool_call>"),
    ),
    ToolFormat(
        ("nemotron",), read_calls, opens=("<TOOLCALL>",), ends=("</TOOLCALL>",),
        frame=_framed("<TOOLCALL>[", OBJECT, "]</TOOLCALL>"),
    ),
    ToolFormat(
        ("cohere",), read_calls, opens=("<|START_ACTION|>",), ends=("<|END_ACTION|>",),
        frame=('<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "{name}", "parameters": ', "}]<|END_ACTION|>"),
    ),
    ToolFormat(("gemma4",), Gemma('<|"|>'), opens=("<|tool_call>",), ends=("<tool_call|>",)),
    ToolFormat(
        ("functiongemma",), Gemma("<escape>"), opens=("<start_function_call>",), ends=("<end_function_call>",)
    ),
)  # fmt: skip


def tool_formats() -> dict[str, ToolFormat]:
    """The formats by the names that --tool-call-parser takes, but for those with a stream of their own."""
    return {name: form for form in FORMATS for name in form.names}


def format_of_template(template: str) -> ToolFormat | None:
    """The format whose marks a chat template writes: of several the one with most of them."""
    fitting = [form for form in FORMATS if form.opens and all(mark in template for mark in (*form.opens, *form.groups))]
    return max(fitting, key=lambda form: len([mark for mark in form.marks if mark in template]), default=None)
