"""String formats that are enforced, as regexes on which validators agree (subsets of what the RFCs allow)."""

from __future__ import annotations

_DATE = (
    r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[a-zA-Z]([a-zA-Z0-9-]{0,20}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,4}}"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_PATH = r"(/[a-zA-Z0-9._~-]{1,32}){0,8}/?"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P((\d{1,4}Y)(\d{1,2}M(\d{1,2}D)?)?|\d{1,2}M(\d{1,2}D)?|\d{1,3}D|\d{1,3}W|"
    r"(\d{1,3}D)?T(\d{1,2}H(\d{1,2}M(\d{1,2}S)?)?|\d{1,2}M(\d{1,2}S)?|\d{1,2}S))",
    "email": rf"[a-zA-Z0-9_+-]{{1,32}}(\.[a-zA-Z0-9_+-]{{1,16}}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,3}}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": r"[0-9a-fA-F]{1,4}(:[0-9a-fA-F]{1,4}){7}|::1?|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"https?://{_HOST}(:[1-9]\d{{0,3}})?{_PATH}(\?[a-zA-Z0-9=&_-]{{1,64}})?(#[a-zA-Z0-9_-]{{1,32}})?",
    "uri-reference": rf"(https?://{_HOST})?{_PATH}",
    "json-pointer": r"(/[a-zA-Z0-9_.-]{0,32}){0,8}",
}
NO_LIMIT = frozenset({"password", "float", "double", "binary"})
"""Formats of OpenAPI that exclude no value."""
INTEGER_FORMATS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
