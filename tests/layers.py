"""Reads packages without importing them: who imports whom, who inherits from whom, and privates.

Everything is found in the syntax trees, so that imports for types only, and those within a
function, count as well. What may import what is data: `Rules`. `test_layers.py` holds ours.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

__all__ = ["Backend", "Package", "Rules", "Sources", "violations", "within"]


# --- what stands there -----------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One module needs another.

    Attributes:
        user: The module that imports.
        used: The module that is imported; where a name is taken of a package, the package.
        name: What is taken of it, or None.
    """

    user: str
    used: str
    name: str | None = None


@dataclass
class Class:
    """A class, and what it says about privates.

    Attributes:
        bases: Full names of its bases, as far as they are known.
        defined: Private names that it defines: methods, attributes of the class, and those that
            its methods assign to ``self``.
        touched: Private names that its methods read of ``self``, or call through ``super()``.
    """

    name: str
    module: str
    bases: list[str] = field(default_factory=list[str])
    defined: set[str] = field(default_factory=set[str])
    touched: set[str] = field(default_factory=set[str])


@dataclass
class Module:
    """A file, parsed."""

    name: str
    path: Path
    is_package: bool
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """The imports, calls and attributes in it; all else is walked past once."""
        kinds = (ast.Import, ast.ImportFrom, ast.Call, ast.Attribute)
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    @cached_property
    def public(self) -> set[str] | None:
        """The names in its ``__all__``; None where it has none."""
        for node in self.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    return set(ast.literal_eval(value))
                case _:
                    pass
        return None

    @property
    def package(self) -> str:
        """The distributed package that it belongs to, e.g. ``pubsub_mqtt``."""
        return self.name.partition(".")[0]


class Sources:
    """The modules below some folders, each of which is a package."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.modules: dict[str, Module] = {}
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                tree = ast.parse(path.read_text(encoding="utf-8"))
                self.modules[name] = Module(name, path, is_package, tree)
        self.packages = {module.package for module in self.modules.values()}

    @cached_property
    def uses(self) -> list[Use]:
        """Every import of one module by another, wherever it stands."""
        return [use for module in self.modules.values() for use in self._of(module)]

    def _of(self, module: Module) -> Iterator[Use]:
        for node in module.nodes:
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        yield from self._use(module, alias.name, None)
                case ast.ImportFrom(names=names):
                    origin = _origin(module, node)
                    for alias in names:
                        yield from self._use(module, origin, alias.name)
                case ast.Call(
                    func=ast.Attribute(attr="import_module") | ast.Name(id="__import__"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    yield from self._use(module, name, None)
                case _:
                    pass

    def _use(self, module: Module, origin: str, name: str | None) -> Iterator[Use]:
        if origin.partition(".")[0] not in self.packages:
            return
        if name is not None and f"{origin}.{name}" in self.modules:
            yield Use(module.name, f"{origin}.{name}")
        else:
            yield Use(module.name, origin, name)

    # --- names in a module ---------------------------------------------------------------

    @cached_property
    def _imported(self) -> dict[str, dict[str, str]]:
        """For each module, what the names that it imports stand for."""
        found: dict[str, dict[str, str]] = {}
        for module in self.modules.values():
            names = found[module.name] = {}
            for node in module.nodes:
                match node:
                    case ast.Import(names=aliases):
                        for alias in aliases:
                            whole = alias.asname is not None
                            first = alias.name if whole else alias.name.partition(".")[0]
                            names[alias.asname or first] = first
                    case ast.ImportFrom(names=aliases):
                        origin = _origin(module, node)
                        for alias in aliases:
                            names[alias.asname or alias.name] = f"{origin}.{alias.name}"
                    case _:
                        pass
        return found

    def resolve(self, module: str, dotted: str) -> str:
        """Return the full name of what *dotted* means in *module*, re-exports followed."""
        first, _, rest = dotted.partition(".")
        target = self._imported[module].get(first)
        full = f"{module}.{dotted}" if target is None else f"{target}.{rest}" if rest else target
        for _ in range(5):
            owner, _, name = full.rpartition(".")
            again = self._imported.get(owner, {}).get(name)
            if again is None or full in self.modules:
                return full
            full = again
        return full

    @cached_property
    def classes(self) -> dict[str, Class]:
        """Every class, by its full name."""
        found: dict[str, Class] = {}
        for module in self.modules.values():
            for name, node in _classes(module.tree.body, ""):
                made = Class(f"{module.name}.{name}", module.name)
                made.bases = [
                    self.resolve(module.name, dotted)
                    for dotted in (_dotted(base) for base in node.bases)
                    if dotted
                ]
                _privates(node, made)
                found[made.name] = made
        return found

    def ancestors(self, found: Class) -> list[Class]:
        """Return the classes that *found* inherits from, as far as they are ours."""
        line: list[Class] = []
        waiting = list(found.bases)
        while waiting:
            base = self.classes.get(waiting.pop())
            if base is not None and base not in line:
                line.append(base)
                waiting += base.bases
        return line

    @cached_property
    def private_names(self) -> dict[str, set[str]]:
        """For each package, the private names that its classes and modules define."""
        found: dict[str, set[str]] = {package: set() for package in self.packages}
        for each in self.classes.values():
            found[each.module.partition(".")[0]] |= each.defined
        for module in self.modules.values():
            for node in module.tree.body:
                found[module.package] |= {name for name in _bound(node) if _is_private(name)}
        return found


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _dotted(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            inner = _dotted(value)
            return None if inner is None else f"{inner}.{attr}"
        case ast.Subscript(value=value):  # Base[int]
            return _dotted(value)
        case _:
            return None


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _bound(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module or a class binds."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            for target in targets:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name):
                        yield each.id
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.If(body=body, orelse=orelse) | ast.Try(body=body, orelse=orelse):
            for each in [*body, *orelse]:
                yield from _bound(each)
        case _:
            pass


def _classes(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in body:
        match node:
            case ast.ClassDef(name=name):
                yield prefix + name, node
                yield from _classes(node.body, f"{prefix}{name}.")
            case ast.If(body=inner, orelse=orelse):
                yield from _classes([*inner, *orelse], prefix)
            case ast.FunctionDef(body=inner) | ast.AsyncFunctionDef(body=inner):
                yield from _classes(inner, prefix)
            case _:
                pass


def _privates(node: ast.ClassDef, found: Class) -> None:
    for statement in node.body:
        found.defined |= {name for name in _bound(statement) if _is_private(name)}
    for each in _attributes(node):
        if not _is_private(each.attr):
            continue
        match each.value:
            case ast.Name(id="self" | "cls"):
                if isinstance(each.ctx, ast.Store):
                    found.defined.add(each.attr)
                else:
                    found.touched.add(each.attr)
            case ast.Call(func=ast.Name(id="super")):
                found.touched.add(each.attr)
            case _:
                pass


def _attributes(node: ast.AST) -> Iterator[ast.Attribute]:
    """Yield the attributes in *node*, those of classes within it left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            continue
        if isinstance(child, ast.Attribute):
            yield child
        yield from _attributes(child)


# --- what may stand there ----------------------------------------------------------------------


def within(module: str, room: str) -> bool:
    """Whether *module* is *room* or below it."""
    return module == room or module.startswith(f"{room}.")


@dataclass(frozen=True)
class Package:
    """A package of layers, the lowest first; a room may use those of its own layer and below.

    Attributes:
        layers: Names of rooms, below the package.
        private: Rooms that only certain others use: room to users.
        facade: The package itself, whose ``__init__`` may use everything and nobody uses.
    """

    name: str
    layers: tuple[tuple[str, ...], ...]
    private: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def layer(self, module: str) -> int | None:
        """Return the number of the layer of *module*, or None where it has no room."""
        inner = module.removeprefix(f"{self.name}.")
        for number, rooms in enumerate(self.layers):
            if any(within(inner, room) for room in rooms):
                return number
        return None


@dataclass(frozen=True)
class Backend:
    """A package with doors; what is behind none of them is shared by all.

    Attributes:
        doors: Rooms that use what is shared, and never each other.
        shared: Rooms below a door that are shared all the same: import paths that have to stay.
        others: For each other backend that it may use, the rooms there that it may use.
    """

    name: str
    doors: tuple[str, ...]
    shared: tuple[str, ...] = ()
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def door(self, module: str) -> str | None:
        """Return the door that *module* is behind, or None where it is shared."""
        inner = module.removeprefix(f"{self.name}.")
        if any(within(inner, room) for room in self.shared):
            return None
        return next((door for door in self.doors if within(inner, door)), None)


@dataclass(frozen=True)
class Rules:
    """What holds for all packages.

    Attributes:
        core: The package that backends are made for.
        open: Rooms of the core that backends may use.
        exceptions: Imports that are allowed all the same: user to used, with the reason.
    """

    core: Package
    open: tuple[str, ...]
    backends: tuple[Backend, ...]
    exceptions: Mapping[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])


def violations(sources: Sources, rules: Rules) -> list[str]:
    """Return one line for everything that breaks a rule, sorted."""
    found: set[str] = set()
    for use in sources.uses:
        if use.user != use.used and (use.user, use.used) not in rules.exceptions:
            found.update(_misused(use, rules))
            found.update(_unannounced(use, sources))
    found.update(_homeless(sources, rules.core))
    found.update(_circles(sources))
    found.update(_private(sources))
    return sorted(found)


def _unannounced(use: Use, sources: Sources) -> Iterator[str]:
    """Yield what one package takes of another that is not said to be public."""
    if use.user.partition(".")[0] == use.used.partition(".")[0]:
        return
    module = sources.modules.get(use.used)
    if any(_is_private(part) for part in use.used.split(".")):
        yield f"{use.user} imports {use.used}, which is private"
    elif use.name is not None and module is not None and use.name not in (module.public or ()):
        yield f"{use.user} imports {use.name} of {use.used}, which its __all__ does not name"


def _misused(use: Use, rules: Rules) -> Iterator[str]:
    user, used = use.user.partition(".")[0], use.used.partition(".")[0]
    arrow = f"{use.user} imports {use.used}"
    if user == rules.core.name:
        if used != user:
            yield f"{arrow}: the core knows no backend"
        else:
            yield from _upward(use, rules.core, arrow)
        return
    backend = next((each for each in rules.backends if each.name == user), None)
    if backend is None:
        yield f"{user} is a package that no rule names"
    elif used == rules.core.name:
        inner = use.used.removeprefix(f"{used}.")
        if not any(within(inner, room) for room in rules.open):
            yield f"{arrow}: it is not for backends"
    elif used != user:
        inner = use.used.removeprefix(f"{used}.")
        if not any(within(inner, room) for room in backend.others.get(used, ())):
            yield f"{arrow}: no door between the two"
        other = next((each for each in rules.backends if each.name == used), None)
        door = None if other is None else other.door(use.used)
        if door is not None and door != backend.door(use.user):
            yield f"{arrow}: only from door {door}"
    else:
        yield from _sideways(use, backend, arrow)


def _upward(use: Use, core: Package, arrow: str) -> Iterator[str]:
    for room, users in core.private.items():
        inner_used = use.used.removeprefix(f"{core.name}.")
        inner_user = use.user.removeprefix(f"{core.name}.")
        if within(inner_used, room) and not any(
            within(inner_user, each) for each in (room, *users)
        ):
            yield f"{arrow}: only {' and '.join(users) or 'tests'} may"
    if use.user == core.name:
        return
    if use.used == core.name:
        yield f"{arrow}: the package imports its rooms, not they the package"
        return
    user, used = core.layer(use.user), core.layer(use.used)
    if user is not None and used is not None and used > user:
        yield f"{arrow}: upward"


def _sideways(use: Use, backend: Backend, arrow: str) -> Iterator[str]:
    if use.user == backend.name:
        return
    if use.used == backend.name:
        yield f"{arrow}: the package imports its rooms, not they the package"
        return
    user, used = backend.door(use.user), backend.door(use.used)
    if used is None or user == used:
        return
    yield f"{arrow}: from {f'door {user}' if user else 'what is shared'} to door {used}"


def _homeless(sources: Sources, core: Package) -> Iterator[str]:
    for module in sources.modules.values():
        if module.package == core.name != module.name and core.layer(module.name) is None:
            yield f"{module.name} has no room"


def _circles(sources: Sources) -> Iterator[str]:
    """Yield every group of modules that import each other, directly or not (Tarjan's)."""
    arrows: dict[str, set[str]] = {name: set() for name in sources.modules}
    for use in sources.uses:
        if use.used in arrows and use.used != use.user:
            arrows[use.user].add(use.used)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[str]:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            circle = sorted(stack[at:])
            del stack[at:]
            if len(circle) > 1:
                yield f"circle: {', '.join(circle)}"

    for name in sorted(arrows):
        if name not in index:
            yield from visit(name)


def _private(sources: Sources) -> Iterator[str]:
    """Yield private names of one package that another uses or overrides."""
    for each in sources.classes.values():
        own = each.module.partition(".")[0]
        line = sources.ancestors(each)
        ours = {name for base in [each, *line] if _package(base) == own for name in base.defined}
        for base in line:
            if _package(base) == own:
                continue
            for name in sorted(each.defined & base.defined):
                yield f"{each.name} overrides {base.name}.{name}, which is private"
            for name in sorted((each.touched & base.defined) - ours):
                yield f"{each.name} uses {base.name}.{name}, which is private"
    for module in sources.modules.values():
        yield from _reached(module, sources)


def _reached(module: Module, sources: Sources) -> Iterator[str]:
    """Yield private attributes of other objects than ``self`` that are another package's."""
    mine = sources.private_names[module.package]
    others = {
        name
        for package, names in sources.private_names.items()
        if package != module.package
        for name in names
    } - mine
    for node in module.nodes:
        match node:
            case ast.Attribute(
                value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))
            ):
                pass  # `_private` knows the class
            case ast.Attribute(value=value, attr=attr) if _is_private(attr):
                dotted = _dotted(value)
                target = sources.resolve(module.name, dotted) if dotted else ""
                package = target.partition(".")[0]
                is_foreign = package in sources.packages and package != module.package
                if is_foreign or attr in others:
                    yield f"{module.name} uses {ast.unparse(node)}, which is private"
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "delattr" | "hasattr"),
                args=[_, ast.Constant(value=str(attr)), *_],
            ) if _is_private(attr) and attr in others:
                yield f"{module.name} uses {ast.unparse(node)}, which is private"
            case _:
                pass


def _package(found: Class) -> str:
    return found.module.partition(".")[0]
