"""Files with a right checksum and a wrong content."""

import copy
import hashlib
import json

from hypothesis import strategies as st


def sealed(kind, header, content):
    """A file of a header, which may be bytes, and what is behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + content
    return kind.magic + hashlib.sha256(body).digest() + body


def opened(kind, data):
    """Header and content of a file."""
    start = len(kind.magic) + 40
    length = int.from_bytes(data[start - 8 : start], "little")
    return json.loads(data[start : start + length]), data[start + length :]


def map_header(kind, data, change):
    """Header and content of a file, after `change` was done to the header."""
    header, content = opened(kind, data)
    change(header)
    return header, content


ODD_VALUES = [
    *(None, True, False, 0, 1, 2, 7, -1, -(2**31), 2**31, 2**32, 2**62, 2**63, 2**64, 10**30),
    *(float("nan"), float("inf"), 0.0, 1.0, 3.0, -0.5, "", "3", "bits", "indices", "a/kernel", "\ud800"),
    *([], [1], [2**62, 4], [-1, -1], [[1]], [None], ["1"], [True, 1, 1], {}, {"path": "a"}),
]


@st.composite
def mutations(draw, header):
    """A header with a value replaced, taken out, doubled or moved, once to three times."""
    header = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 3))):
        if not (places := list(_places(header))):
            break
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "nudge", "remove", "double", "swap"]))
        if how == "remove":
            del holder[key]
        elif how == "double" and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif how == "swap":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
        elif how == "nudge" and type(holder[key]) is int:
            holder[key] += draw(st.sampled_from([-1, 1, 8, -8]))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return header


def _places(value):
    """Every place in a header: what holds it, and its key or number there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@st.composite
def contents(draw, content):
    """Bytes as they are, or cut, longer, or with some of them changed."""
    how = draw(st.sampled_from(["same", "same", "cut", "longer", "changed"]))
    if how == "cut":
        return content[: draw(st.integers(0, max(len(content) - 1, 0)))]
    if how == "longer":
        return content + draw(st.binary(min_size=1, max_size=9))
    if how == "changed" and content:
        at = draw(st.integers(0, len(content) - 1))
        return content[:at] + draw(st.binary(min_size=1, max_size=1)) + content[at + 1 :]
    return content
