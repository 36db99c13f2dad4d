"""Statements compiled as a function whose names are all global do what they did."""

import __future__

import ast
from types import FunctionType

import pytest

from nnsight_eager.rewriting import (
    CAUGHT,
    DELETED,
    as_function,
    declared_global,
    leaving,
    names_of,
    only_in_comprehensions,
    without_asserts,
)


def statements(text):
    return ast.parse(text).body


def module_code(name="<module>", flags=0):
    return compile("", "script.py", "exec", flags, dont_inherit=True).replace(co_name=name, co_qualname=name)


def compiled(text, around=None, owner=None):
    return as_function(statements(text), around or module_code(), "script.py", owner)


def run(text, **names):
    """What the statements have bound."""
    FunctionType(compiled(text), names)()
    return {name: value for name, value in names.items() if name != "__builtins__"}


# What leaves


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("return", ["return"]),
        ("x = yield", ["yield"]),
        ("yield from x", ["yield"]),
        ("await x", ["await"]),
        ("async for x in y: break", ["async for"]),
        ("async with x: pass", ["async with"]),
        ("x = [y async for y in z]", ["async for"]),
        ("break", ["break"]),
        ("if x:\n    continue\nelse:\n    break", ["continue", "break"]),
        ("for x in y:\n    break\nelse:\n    continue", ["continue"]),
        ("while x:\n    for y in z:\n        continue\n    break\nelse:\n    break", ["break"]),
        ("while (yield): pass", ["yield"]),
        ("for x in await y: pass", ["await"]),
        ("for x[(yield)] in y: pass", ["yield"]),
        ("try:\n    return\nexcept (yield):\n    raise\nfinally:\n    return", ["return", "yield", "return"]),
        ("def f(x=(yield)):\n    yield\n    return", ["yield"]),
        ("@(yield)\nasync def f(*, x=(yield)): await x", ["yield", "yield"]),
        ("class C((yield), k=(yield)): pass", ["yield", "yield"]),
        ("f = lambda x=(yield): (yield)", ["yield"]),
        ("def f():\n    return 1", []),
        ("async def f():\n    await x\n    async with y: return", []),
        ("for x in y:\n    if x: break\n    continue", []),
        ("f = lambda: (yield)", []),
    ],
)
def test_what_leaves_the_statements_is_found_as_one_would_write_it(text, found):
    assert list(leaving(statements(text))) == found


# Names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, (b, *c), d.e, f[0] = x", "abc"),
        ("a += 1\nb: int = 1\nc: int", "ab"),
        ("for a, b in x: c = 1", "abc"),
        ("with x as a, y as (b, *c): pass", "abc"),
        ("import a, b.x, x.y as c\nfrom x import d, y as e", "abcde"),
        ("def a(x, *y, **z): u = 1\nasync def b(): pass\nclass c: v = 1", "abc"),
        ("try: pass\nexcept x as a: b = 1\nelse: c = 1\nfinally: d = 1", "abcd"),
        (
            "match x:\n    case [a, *b]: pass\n    case {'k': c, **d}: pass\n    case C(e, k=f) as g: pass\n    case _: pass",
            "abcdefg",
        ),
        ("a = [b := x for x in y if (c := x)]", "abc"),
        ("x = (lambda y=(a := 1): y)", "ax"),
        ("def f(y=(a := 1)): pass", "af"),
        ("@(a := x)\nclass C((b := y)): pass", "Cab"),
        ("if a := x:\n    pass\nwhile b := y: pass", "ab"),
        ("del a, (b, c), d[0], e.f", "abc"),
        ("global a\na = 1", "a"),
        ("nonlocal a\na = 1", "a"),
        ("def f():\n    nonlocal a\n    def g():\n        nonlocal a, b\n        a = b = 1\n    b = 1", "af"),
        ("def f():\n    global a\n    a = 1", "af"),
        ("class C:\n    global a\n    a = 1", "Ca"),
        ("x = [y for y in z]\nlambda u: u\n{v: w for v, w in z}", "x"),
        ("pass", ""),
    ],
)
def test_what_the_statements_bind_is_what_their_code_stores_globally(text, names):
    assert "".join(sorted(names_of(compiled(text))[1])) == names


def test_what_is_looked_up_is_found_in_nested_code_too():
    loads = names_of(compiled("def f():\n    return [a for _ in b]\nclass C:\n    x = c\nlambda: d"))[0]
    assert loads >= {"a", "b", "c", "d"}


def test_what_is_deleted_is_told_apart_from_what_is_bound():
    loads, stores, deletes = names_of(compiled("a = 1\ndel a, (b, [c])\ntry: pass\nexcept E as d: pass"))
    assert (sorted(stores), sorted(deletes)) == (["a", "b", "c", "d"], ["a", "b", "c"])
    assert {"a", "b", "c"} <= loads, "what is deleted is fetched first"


def test_global_names_are_those_declared_anywhere():
    assert declared_global(statements("global a\ndef f():\n    global b, c\n    class C:\n        global d\ne = 1")) == {
        *"abcd"
    }


def test_a_variable_of_a_comprehension_alone_is_not_the_functions():
    (function,) = statements("""
def f(a, *b, c=1, **d):
    e = [a + x for x, (y, *z) in s if (w := x)]
    f = {e: b for e in s for g in s}, {b for b in s}, (u for u in s), [[v for v in s] for c in s]
    def h():
        return [t for t in s]
    lambda: [r for r in s]
    for y in e: pass
""")
    assert sorted(only_in_comprehensions(function)) == ["g", "u", "v", "x", "z"]


# What the code does


def test_every_binding_is_in_the_dictionary():
    bound = run(
        "a = 1\nfor b in range(2): pass\ndef c():\n    global d\n    d = 1\nc()\nimport math as e\n[f := 1 for _ in 'x']"
    )
    assert sorted(bound) == [*"abcdef"]


def test_annotations_of_names_bind_what_they_assign():
    assert run("a: int = 1\nb: nobody\nc: nobody = 2\n(d): nobody = 3") == {"a": 1, "c": 2, "d": 3}


def test_a_string_in_front_is_no_docstring():
    code = compiled("'a string'\na = 1")
    assert FunctionType(code, {}).__doc__ is None


def test_nonlocal_means_the_function_that_binds_the_name_and_else_the_statements():
    bound = run("""
nonlocal top
top = 1
def outer(inner_name):
    def middle():
        nonlocal inner_name, top
        inner_name += 1
        top += 1
        def deepest():
            nonlocal inner_name, top
            inner_name += 10
            top += 10
        deepest()
    middle()
    return inner_name
result = outer(100)
""")
    assert (bound["top"], bound["result"]) == (12, 111)


def test_nonlocal_does_not_mean_the_names_of_a_class():
    bound = run("""
x = 1
def f():
    x = 2
    class C:
        x = 3
        def m(self):
            nonlocal x
            x = 4
    C().m()
    return x, C.x
result = f()
""")
    assert (bound["x"], bound["result"]) == (1, (4, 3))


def test_nonlocal_in_a_method_of_a_class_of_the_statements_means_their_name():
    bound = run("x = 1\nclass C:\n    x = 3\n    def m(self):\n        nonlocal x\n        x = 4\nC().m()\ny = C.x")
    assert (bound["x"], bound["y"]) == (4, 3)


def test_what_is_deleted_is_marked():
    assert run("a = 1\ndel a") == {f"a{DELETED}": True}


def test_what_is_deleted_inside_a_function_is_its_own():
    assert sorted(run("def f(x):\n    del x\nf(1)")) == ["f"]


def test_the_name_of_a_caught_error_is_marked_when_it_is_caught():
    text = "try:\n    if x: raise KeyError\nexcept KeyError as error:\n    pass"
    assert run(text, x=True, KeyError=KeyError) == {"x": True, "KeyError": KeyError, f"error{CAUGHT}": True}
    assert run(text, x=False, KeyError=KeyError) == {"x": False, "KeyError": KeyError}


def test_assertions_can_be_left_out():
    text = "assert a\nif b:\n    assert c\nfor d in ():\n    assert e\nelse:\n    f = 1"
    kept = without_asserts(statements(text))
    assert not [node for each in kept for node in ast.walk(each) if isinstance(node, ast.Assert)]
    assert sorted(names_of(as_function(kept, module_code(), "script.py", None))[0]) == ["b", "d", "f"]


def test_the_statements_that_are_given_are_not_changed():
    body = statements("a: int = 1\ndel a\nif a:\n    assert a\ntry: pass\nexcept E as e: pass\ndef f():\n    nonlocal a")
    before = [ast.dump(node, include_attributes=True) for node in body]
    as_function(body, module_code(), "script.py", None)
    without_asserts(body)
    assert [ast.dump(node, include_attributes=True) for node in body] == before


# The code around


def test_lines_names_and_file_are_the_codes_around():
    code = compiled("\n\na = 1\ndef f():\n    b = 1\n", module_code("run"))
    assert (code.co_name, code.co_qualname, code.co_filename) == ("run", "run", "script.py")
    assert {line for *_, line in code.co_lines() if line} == {3, 4}


def test_positions_are_those_of_the_text():
    code = compiled("x = (a +\n     b)")
    plain = compile("x = (a +\n     b)", "script.py", "exec")
    wanted = {place for place in plain.co_positions() if place[2:] != (0, 0)}
    assert {place for place in code.co_positions() if None not in place} >= {p for p in wanted if None not in p}


def test_the_name_of_a_cell_needs_not_be_an_identifier():
    assert compiled("a = 1", module_code("<cell line: 1>")).co_name == "<cell line: 1>"


def test_future_statements_of_the_code_around_hold():
    future = module_code(flags=__future__.annotations.compiler_flag)
    names = {}
    FunctionType(compiled("def f(x: nobody): pass", future), names)()
    assert names["f"].__annotations__ == {"x": "nobody"}
    with pytest.raises(NameError):
        run("def f(x: nobody): pass")


def test_private_names_are_those_of_the_class_around():
    names = {}
    FunctionType(compiled("__a = 1\ndef f():\n    return __a\nb = f()", owner="_Owner"), names)()
    assert (names["_Owner__a"], names["b"]) == (1, 1)
    assert run("__a = 1") == {"__a": 1}
