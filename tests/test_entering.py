"""Whether a call is what a `with` statement enters, told from the instructions around it."""

import asyncio
import contextlib
import sys
import textwrap

import pytest
from small_models import run_python

from nnsight_eager.entering import enters_call_of, is_entered

told: list[bool] = []


class Context:
    """A context of either kind, which can be passed around and called on."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def backward(self, *_, **__):
        return call()


def call(*_, **__):
    """Note whether what calls this enters it."""
    frame = sys._getframe(1)
    told.append(is_entered(frame.f_back if frame.f_code.co_name == "backward" else frame))
    return Context()


def told_by(code):
    """What each `call` in the code was told, in the order they ran."""
    told.clear()
    exec(textwrap.dedent(code), {"call": call, "Context": Context, "context": Context(), "contextlib": contextlib})
    return [*told]


@pytest.mark.parametrize(
    "header",
    [
        "with call():",
        "with call() as entered:",
        "with call() as context.attribute:",
        "with (call()):",
        "with (call() as entered):",
        "with (\n    call()\n):",
        "with call(1, 2, key=3):",
        "with call(*[1], **{'key': 2}):",
        "with call(*[1]):",
        "with context.backward():",
        "with context.backward(1, key=2):",
        "with context.backward(*[1]):",
        "with context.backward(\n    1,\n    key=2,\n) as entered:",
        "with (lambda: context)(), call():",
    ],
)
def test_a_call_is_entered_where_the_with_statement_is_its_own(header):
    assert told_by(f"{header}\n    pass") == [True]


@pytest.mark.parametrize(
    "code",
    [
        "call()",
        "entered = call()",
        "entered = call()\nwith entered:\n    pass",
        "with context:\n    call()",
        "with context:\n    pass\ncall()",
        "with (entered := call()):\n    pass",
        "with call() or context:\n    pass",
        "with call() if 1 + len('') else context:\n    pass",
        "with [call()][0]:\n    pass",
        "with [call() for _ in range(1)][0]:\n    pass",
        "with contextlib.ExitStack() as stack:\n    stack.enter_context(call())",
        "with contextlib.nullcontext(call()):\n    pass",
        "with contextlib.nullcontext(enter_result=call()):\n    pass",
        "with (lambda: call())():\n    pass",
        "for _ in [call()]:\n    pass",
        "call().__enter__()",
    ],
)
def test_a_call_is_not_entered_where_the_with_statement_is_anothers_or_enters_something_else(code):
    assert told_by(code) == [False]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("with call(), call():", [True, True]),
        ("with call() as one, call() as two:", [True, True]),
        ("with (call() as one, call() as two):", [True, True]),
        ("with (\n    call(),\n    call(),\n):", [True, True]),
        ("with context, call():", [True]),
        ("with call(), context:", [True]),
        ("with call(call()):", [False, True]),
        ("with call(key=call()):", [False, True]),
        ("with call(call(call())), call(call()):", [False, False, True, False, True]),
        ("with call().backward():", [False, True]),
        ("with call(*[call()]):", [False, True]),
    ],
)
def test_of_several_calls_in_one_header_each_is_told_apart(header, expected):
    assert told_by(f"{header}\n    pass") == expected


def test_one_line_may_hold_both_kinds():
    assert told_by("with call(): call(); entered = call()") == [True, False, False]


def test_calls_in_the_body_are_not_entered_and_nested_statements_are():
    code = """
        with call() as one:
            call()
            with call():
                call()
            call()
    """
    assert told_by(code) == [True, False, True, False, False]


def test_a_call_behind_more_constants_than_an_instruction_can_count_is_told():
    many = "; ".join(f"x{number} = {number}.5" for number in range(400))
    assert told_by(f"{many}\nwith call(1000.5, key={{'a': 2000.5}}):\n    call(3000.5)") == [True, False]


def test_the_same_statement_is_told_each_time_it_runs():
    assert told_by("for _ in range(3):\n    with call():\n        call()") == [True, False] * 3


def test_an_async_statement_enters_no_call_of_ours():
    code = """
        import asyncio
        async def main():
            async with call():
                with call():
                    pass
            async with contextlib.AsyncExitStack() as stack:
                call()
            with await awaited():
                pass
        async def awaited():
            return call()
        asyncio.run(main())
    """
    assert told_by(code) == [False, True, False, False]
    asyncio.set_event_loop(None)


def test_functions_methods_generators_and_comprehensions_are_told_from_their_own_code():
    code = """
        def function():
            with call():
                yield call()
        class Class:
            with call():
                pass
            def method(self):
                with call():
                    return call()
        [*function()]
        Class().method()
        [call() for _ in range(1)]
    """
    assert told_by(code) == [True, True, False, True, False, False]


def test_a_call_is_told_while_a_trace_function_is_set():
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert told_by("with call():\n    call()") == [True, False]
    finally:
        sys.settrace(before)


def test_a_call_is_told_where_the_code_was_started_by_the_command_line():
    script = "import sys\nfrom nnsight_eager.entering import is_entered\nimport contextlib\n"
    script += "def call():\n    print(is_entered(sys._getframe(1)))\n    return contextlib.nullcontext()\n"
    assert run_python("-c", f"{script}with call():\n    call()\n").split() == ["True", "False"]


# Whether it is written anywhere


def compiled(code):
    return compile(textwrap.dedent(code), "<code>", "exec")


@pytest.mark.parametrize(
    "code",
    [
        "with loss.backward():\n    pass",
        "with loss.backward(retain_graph=True) as one, other:\n    pass",
        "with trace():\n    with loss.sum().backward():\n        pass",
        "def function():\n    with loss.backward():\n        pass",
        "def function():\n    def inner():\n        with loss.backward():\n            pass",
        "class Class:\n    def method(self):\n        with loss.backward():\n            pass",
        "async def function():\n    with loss.backward():\n        pass",
        "function = lambda: [loss.backward() for _ in open()]\nwith function():\n    with loss.backward():\n        pass",
    ],
)
def test_a_block_of_a_named_method_is_found_in_the_code_and_in_the_functions_it_makes(code):
    assert enters_call_of("backward", compiled(code))


@pytest.mark.parametrize(
    "code",
    [
        "loss.backward()",
        "with trace():\n    pass",
        "with backward:\n    loss.backward()",
        "loss.backward()\ndef function():\n    with trace():\n        pass",
        "async def function():\n    async with loss.backward():\n        pass",
        "with trace('backward'):\n    pass",
    ],
)
def test_code_that_enters_no_such_call_says_so(code):
    assert not enters_call_of("backward", compiled(code))
