"""What a task's data and type may be, decided without a database."""

from __future__ import annotations

import enum
import json
import sys
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import NamedTuple

import pytest
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st

from apoq import ApoqError, InvalidData, InvalidTask
from apoq.core.payload import MAX_DATA_SIZE, MAX_TYPE_LENGTH, check_name, check_type, encode

NAN = float("nan")
INFINITY = float("inf")
SURROGATE = "\udc80"


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Plain(enum.Enum):
    ONE = 1


class Float64(float):
    """As numpy's: a float by inheritance, whose repr is not JSON."""

    def __repr__(self) -> str:
        return f"np.float64({float(self)})"


class Float32:
    """As numpy's: no float by inheritance."""


@dataclass
class Order:
    id: int


class Loud:
    """As an object whose repr needs a database that is closed by now."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Point(NamedTuple):
    x: int
    y: int


def nested(levels: int):
    data = []
    for _ in range(levels - 1):
        data = [data]
    return data


def fault(data, **options) -> InvalidData:
    with pytest.raises(InvalidData) as caught:
        encode(data, **options)
    return caught.value


class TestWhatJsonHolds:
    @pytest.mark.parametrize(
        "data",
        [
            None,
            True,
            False,
            0,
            -7,
            2**70,
            10**4299,
            1.5,
            -0.0,
            5e-324,
            sys.float_info.max,
            "",
            "text",
            '💖 ü \u2028 \x01 \x7f "quoted" \\ /',
            [],
            {},
            [[], {}, [{}]],
            {"": None, "a b": {"ü": ["💖"]}},
        ],
        ids=lambda data: repr(data)[:20],
    )
    def test_it_comes_back_as_it_was(self, data):
        assert json.loads(encode(data)) == data

    @pytest.mark.parametrize(
        ("data", "comes_back"),
        [
            ((1, (2,)), [1, [2]]),
            (Point(1, 2), [1, 2]),
            (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
            (Color.RED, "red"),
            ({Color.RED: Color.RED}, {"red": "red"}),
            ([Level.HIGH], [3]),
            ([Float64(1.5)], [1.5]),
        ],
        ids=repr,
    )
    def test_what_is_a_kind_of_json_comes_back_as_json(self, data, comes_back):
        assert json.loads(encode(data)) == comes_back

    @pytest.mark.parametrize("text", ["\\u0000", "a\\u0000b", "\\\\u0000", "\\udc80"])
    def test_a_backslash_and_u0000_are_six_characters_like_any_other(self, text):
        assert json.loads(encode({text: [text]})) == {text: [text]}

    def test_text_is_not_escaped_so_that_its_size_is_what_it_is(self):
        assert encode({"color": "💖"}) == '{"color":"💖"}'

    def test_the_same_object_may_stand_in_two_places(self):
        shared = [1]

        assert encode([shared, shared, {"a": shared}]) == '[[1],[1],{"a":[1]}]'

    def test_data_are_not_changed(self):
        data = {"a": [1, (2, 3)]}

        encode(data)

        assert data == {"a": [1, (2, 3)]}


class TestWhatItDoesNotHold:
    @pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY, Float64("nan"), Float64("inf")], ids=repr)
    def test_a_number_that_is_none(self, number):
        error = fault({"prices": [1.0, number]})

        assert str(error) == f"data['prices'][1]: JSON has no {float(number)}: pass None or text instead"

    @pytest.mark.parametrize(
        ("text", "named"), [("a\0b", "U+0000 (NUL)"), (f"a{SURROGATE}", "a lone surrogate")]
    )
    @pytest.mark.parametrize(
        ("wrap", "path"),
        [
            (lambda text: text, "data"),
            (lambda text: [1, text], "data[1]"),
            (lambda text: {"a": {"b": [text]}}, "data['a']['b'][0]"),
            (lambda text: {"a": ({text: 1},)}, "data['a'][0]"),
        ],
        ids=["alone", "in a list", "deep down", "as a key"],
    )
    def test_text_that_jsonb_refuses(self, wrap, path, text, named):
        error = fault(wrap(text))

        assert error.path == path
        assert named in str(error)

    def test_text_that_jsonb_refuses_beside_a_harmless_backslash_u0000(self):
        assert fault(["\\u0000", "\0"]).path == "data[1]"

    @pytest.mark.parametrize("key", [1, 1.5, True, None, (1, 2), b"a", Plain.ONE], ids=repr)
    def test_a_key_that_is_no_text(self, key):
        error = fault({"a": [{key: 1}]})

        assert str(error) == f"data['a'][0]: a key of a JSON object must be a string, got {key!r}"

    @pytest.mark.parametrize(
        "value",
        [
            b"bytes",
            bytearray(b"bytes"),
            {1, 2},
            frozenset(),
            datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            date(2026, 1, 2),
            timedelta(1),
            Decimal("1.5"),
            Fraction(1, 2),
            uuid.UUID(int=0),
            1j,
            range(3),
            Order(7),
            Plain.ONE,
            Float32(),
            PurePosixPath("/tmp"),
            object(),
            Order,
            len,
            Ellipsis,
            (n for n in range(3)),
            {"a": 1}.keys(),
        ],
        ids=lambda value: type(value).__qualname__,
    )
    def test_an_object_of_python_alone(self, value):
        error = fault({"x": value})

        assert str(error).startswith(f"data['x']: {type(value).__qualname__} is not JSON, so make it text, ")

    def test_the_message_names_the_path_and_shows_the_value(self):
        error = fault({"user": {"joined": datetime(2026, 1, 2, tzinfo=UTC)}})

        assert error.path == "data['user']['joined']"
        assert str(error).startswith("data['user']['joined']: datetime is not JSON")
        assert str(error).endswith(": datetime.datetime(2026, 1, 2, 0, 0, tzinfo=datetime.timezone.utc)")

    def test_the_path_begins_with_the_name_that_it_is_given(self):
        assert fault({"x": b""}, name="items[17]").path == "items[17]['x']"

    def test_the_first_fault_is_the_one_named(self):
        assert fault([{"a": 1}, {"b": NAN}, {"c": b""}]).path == "data[1]['b']"

    def test_a_value_whose_repr_raises_is_named_all_the_same(self):
        assert str(fault([Loud()])).startswith("data[0]: Loud is not JSON")

    @pytest.mark.parametrize(
        "data", [b"x" * 10**6, set(range(10**6)), {"k" * 10**6: b""}, {("k" * 10**6,): 1}, {"\0" * 10**6: 1}]
    )
    def test_a_message_is_short_whatever_the_value(self, data):
        assert len(str(fault(data))) < 400

    def test_a_list_that_contains_itself(self):
        data: list[object] = [1]
        data.append({"a": data})

        assert str(fault(data)) == "data[1]['a']: it contains itself, which JSON can't"

    def test_a_dict_that_contains_itself(self):
        data: dict[str, object] = {}
        data["me"] = data

        assert str(fault(data)) == "data['me']: it contains itself, which JSON can't"

    @pytest.mark.parametrize("levels", [201, 500, 900, 100_000])
    def test_nesting_deeper_than_a_worker_could_surely_read(self, levels):
        error = fault(nested(levels))

        assert error.path == "data" + "[0]" * 200
        assert "nested more than 200 levels deep" in str(error)

    def test_nesting_up_to_the_limit_is_fine_wherever_the_caller_stands(self):
        data = nested(200)

        def call_from(depth: int) -> str:
            return call_from(depth - 1) if depth else encode(data)

        assert json.loads(call_from(500)) == data

    @pytest.mark.parametrize("sign", [1, -1])
    def test_an_int_of_more_digits_than_python_reads(self, sign):
        error = fault({"n": [sign * 10**5000]})

        assert error.path == "data['n'][0]"
        assert "more digits" in str(error)

    def test_the_error_is_of_apoq_and_a_value_error(self):
        error = fault(NAN)

        assert isinstance(error, InvalidTask)
        assert isinstance(error, ApoqError)
        assert isinstance(error, ValueError)


class TestSize:
    def test_the_limit_is_met_to_the_byte(self):
        assert len(encode("x" * 98, max_size=100)) == 100
        assert fault("x" * 99, max_size=100).path == "data"

    def test_bytes_count_and_not_characters(self):
        assert len(encode("ü" * 49, max_size=100)) == 51
        assert fault("ü" * 50, max_size=100).path == "data"

    def test_it_is_a_mebibyte_by_default(self):
        assert len(encode("x" * (MAX_DATA_SIZE - 2))) == 1024 * 1024
        assert fault("x" * (MAX_DATA_SIZE - 1)).path == "data"

    def test_the_message_says_how_large_the_data_are_and_what_to_do(self):
        assert str(fault("x" * 1_999, max_size=1_000)) == (
            "data: 2,001 bytes of JSON exceed the limit of 1,000: store large values elsewhere and pass "
            "their key, or raise Queue(max_data_size=…)"
        )


class TestNames:
    @pytest.mark.parametrize(
        "name", ["t", "user.created", "💖", "with space", "x" * MAX_TYPE_LENGTH, Color.RED]
    )
    def test_text_is_a_type(self, name):
        assert check_type(name) == name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "a task's type must not be empty"),
            ("x" * 256, r"a task's type must have at most 255 characters, got 256: 'xxx"),
            (None, "a task's type must be a string, got None"),
            (b"t", "a task's type must be a string, got b't'"),
            (5, "a task's type must be a string, got 5"),
            (Loud(), "a task's type must be a string, got <Loud instance"),
            ("a\0", r"a task's type can't hold U\+0000"),
            (SURROGATE, "a task's type can't hold a lone surrogate"),
        ],
        ids=["empty", "long", "None", "bytes", "int", "no repr", "NUL", "surrogate"],
    )
    def test_anything_else_is_none(self, name, message):
        with pytest.raises(InvalidTask, match=message):
            check_type(name)

    def test_the_message_says_whose_name_it_is(self):
        with pytest.raises(InvalidTask, match="a queue's name must not be empty"):
            check_name("", "a queue's name")


any_text = st.text(st.characters(exclude_categories=[]))
json_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner)
    ),
)
any_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.sampled_from(["\0", "\\u0000", SURROGATE, Color.RED, Level.HIGH])
    | st.binary()
    | st.datetimes()
    | st.decimals(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(any_text | st.integers() | st.none(), inner)
    ),
)
quickly = drawn(30)


def as_json(data):
    if isinstance(data, list | tuple):
        return [as_json(item) for item in data]
    if isinstance(data, dict):
        return {key: as_json(value) for key, value in data.items()}
    return data


@quickly
@given(json_data)
def test_all_that_is_json_comes_back(data):
    assert json.loads(encode(data)) == as_json(data)


@quickly
@given(any_data)
def test_anything_comes_back_or_is_refused_with_its_path(data):
    try:
        text = encode(data)
    except InvalidData as error:
        refusal = error
    else:
        assert json.loads(text) == as_json(data)
        return

    assert refusal.path.startswith("data")
    assert str(refusal).startswith(refusal.path)
    str(refusal).encode()
