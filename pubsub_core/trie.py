"""`HandlerTrie`: many filters, one topic, and the values of every filter that matches.

Subscriptions, handlers, connections or anything else are kept under topic filters;
`HandlerTrie.match` gives the values whose filter matches a topic, in time linear in the
topic's levels and independent of the filters that do not match.

Filters without a wildcard are found by one dictionary lookup. The others stand in a trie
with one node per level. All four rules are compiled to that same trie, so one loop serves
them: Emitter's prefix rule for ``a/b`` is MQTT's ``a/b/#``, and the ``#`` of its ``mqtt``
mode, which wants one level at least, is MQTT's ``+/#``.

Sources: MQTT 3.1.1 section 4.7; emitter-io/emitter, ``internal/message/subtrie.go`` and its
configuration key ``matcher``.
"""

from __future__ import annotations

from collections.abc import Hashable
from threading import RLock
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, get_args

from .errors import BadOption
from .keyed import BoundedCache
from .topics import check_wildcards

__all__ = ["HandlerTrie", "Rule"]

V = TypeVar("V")

Rule: TypeAlias = Literal["mqtt", "exact", "emitter", "emitter-mqtt"]
"""How a filter matches a topic; see `HandlerTrie`."""

# A result is kept for topics up to this many characters, and with up to this many values:
# together with cache_size that bounds the memory, whatever topics a peer invents.
_KEPT_LENGTH = 512
_KEPT_VALUES = 256


class HandlerTrie(Generic[V]):
    """Values under topic filters, found by topic.

    The rule says when a filter matches:

    * ``mqtt``: ``+`` is one level, a final ``#`` is the level before it and all below. A
      wildcard never matches a first level that begins with ``$``.
    * ``exact``: the filter is the topic. ``+`` and ``#`` are ordinary characters.
    * ``emitter``: Emitter's own rule. A filter matches everything below it too; ``+`` is one
      level; ``#`` is an ordinary word, which no topic has.
    * ``emitter-mqtt``: Emitter with ``matcher: mqtt``. As many levels as the filter; a final
      ``#`` is one level *or more*, so ``a/#/`` does not match ``a/``.

    Under the two Emitter rules a trailing slash says nothing: ``a/`` and ``a`` are the same
    filter and the same topic.

    A filter may have many values, and a value many filters. A filter and a value are a pair
    that is there or not: adding it again changes nothing. Values are the same when they
    would be the same key of a dictionary; those that cannot be one (they are not hashable)
    when they are the same object.

    Results are tuples in the order of adding, across filters; a change during a loop over
    one is no problem, and shows in the next. Any thread may call any method: `match` takes
    no lock, changes take one. Do not change a trie from a finalizer or a signal handler.

    >>> handlers = HandlerTrie[str]()
    >>> handlers.add("lab/+/temp", "log")
    True
    >>> handlers.add("lab/#", "store")
    True
    >>> handlers.match("lab/oven/temp")
    ('log', 'store')
    >>> handlers.match("lab")
    ('store',)
    >>> handlers.remove("lab/#", "store")
    True
    >>> handlers.match("lab"), handlers.filters(), len(handlers)
    ((), ('lab/+/temp',), 1)

    Emitter's rule reaches below:

    >>> channels = HandlerTrie[str]("emitter")
    >>> channels.add("lab/", "everything in the lab")
    True
    >>> channels.match("lab/oven/temp/")
    ('everything in the lab',)

    Args:
        rule: When a filter matches.
        cache_size: How many topics to keep results for. A change drops them all; so does
            one more topic than this. 0 keeps none.
    """

    __slots__ = (
        "_cache",
        "_cache_size",
        "_exact",
        "_is_emitter",
        "_lock",
        "_next",
        "_root",
        "_rule",
        "_wild",
    )

    def __init__(self, rule: Rule = "mqtt", *, cache_size: int = 4096) -> None:
        if rule not in get_args(Rule):
            raise BadOption(
                f"no matching rule {rule!r}", hint=f"use one of {', '.join(get_args(Rule))}"
            )
        if cache_size < 0:
            raise BadOption(f"cache_size is {cache_size}", hint="use 0 to keep no results")
        self._rule: Rule = rule
        self._cache_size = cache_size
        self._is_emitter = rule.startswith("emitter")
        self._lock = RLock()
        self._next = 0
        self._exact: dict[str, _Entry[V]] = {}
        self._wild: dict[str, _Entry[V]] = {}
        self._root: _Node[V] = _NOTHING
        self._cache: dict[str, tuple[V, ...]] = {}

    @property
    def rule(self) -> Rule:
        """The rule given at construction."""
        return self._rule

    def add(self, filter: str, value: V) -> bool:
        """Put *value* under *filter*; False if it was there already.

        The filter is a plain one: pass ``parse_filter(text).filter`` for one with captures,
        and take a ``$share`` prefix off with `split_shared`.

        Raises:
            InvalidFilter: Under the rule ``mqtt``, a wildcard stands where it cannot. What
                else makes a filter invalid, such as its length, is not checked here.
        """
        if self._rule == "mqtt":
            check_wildcards(filter.split("/"), filter)
        key, path, open_end = self._compile(filter)
        name = _name(value)
        with self._lock:
            kept = self._exact if path is None else self._wild
            found = kept.get(key)
            pair = (self._next, value)
            entry: _Entry[V]
            if found is None:
                entry = pair
            elif isinstance(found, _Many):
                if name in found.pairs:
                    return False
                found.pairs[name] = pair
                entry = found
            else:
                pairs = {_name(found[1]): found}
                if name in pairs:
                    return False
                pairs[name] = pair
                entry = _Many(pairs)
            self._next += 1
            if entry is not found:
                kept[key] = entry
                if path is not None:
                    self._put(path, open_end, entry)
            self._forget()
        return True

    def remove(self, filter: str, value: V) -> bool:
        """Take *value* from under *filter*; False if it was not there.

        Branches that hold nothing any more are removed with it.
        """
        key, path, open_end = self._compile(filter)
        name = _name(value)
        with self._lock:
            kept = self._exact if path is None else self._wild
            found = kept.get(key)
            if found is None:
                return False
            if isinstance(found, _Many):
                if found.pairs.pop(name, None) is None:
                    return False
                is_empty = not found.pairs
            elif name not in {_name(found[1]): found}:
                return False
            else:
                is_empty = True
            if is_empty:
                del kept[key]
                if path is not None:
                    self._put(path, open_end, None)
            self._forget()
        return True

    def match(self, topic: str) -> tuple[V, ...]:
        """Return the values of all filters that match *topic*, in the order of adding.

        A value comes once for each of its filters that match; ``dict.fromkeys(…)`` keeps
        the first of each. The topic is not validated.
        """
        # Read before anything else. A change replaces the cache when it is complete, so a
        # result found meanwhile lands in a dictionary that is no longer read.
        cache = self._cache
        kept = cache.get(topic)
        if kept is not None:
            return kept

        entry = None
        if self._exact:
            entry = self._exact.get(_as_channel(topic) if self._is_emitter else topic)
        hits: list[_Entry[V]] = [] if entry is None else [entry]
        if self._wild:
            # Everything in one frame, and nodes as tuples, because unpacking one costs less
            # than reading three attributes: together that halved the time. A recursive walk,
            # a stack of nodes, compressed chains and a table per pattern of wildcards were
            # tried, and none was faster throughout; docs/trie.md has the figures.
            #
            # `below` is taken on the way down, for it matches the topic so far and all under
            # it; `here` only where the topic ends.
            word, child, children, plus, below, here = self._root
            parts = topic.split("/")
            if self._is_emitter:
                if not parts[-1]:
                    del parts[-1]
            elif (plus or below) and topic.startswith("$"):
                # Only filters that begin with this very word; the root's wildcards stay out.
                plus = below = None
            levels = iter(parts)
            # While only one node can match, no list of nodes is needed: most topics never
            # get further than this loop.
            for level in levels:
                if below is not None:
                    hits.append(below)
                # Without a dictionary `child` is the only one, or None with a word that no
                # level equals; so a hit needs no assignment.
                if children is not None:
                    child = children.get(level)
                elif word != level:
                    child = None
                if child is None:
                    if plus is None:
                        break  # nothing below matches, so the `else` of the loop is skipped
                    word, child, children, plus, below, here = plus
                elif plus is None:
                    word, child, children, plus, below, here = child
                else:
                    # From here on two nodes or more may match: the same step for each, a
                    # level at a time. Their number grows only where filters differ by ``+``.
                    nodes = [child, plus]
                    for level in levels:  # noqa: PLW2901  # the same iterator goes on
                        following: list[_Node[V]] = []
                        for word, child, children, plus, below, _ in nodes:
                            if below is not None:
                                hits.append(below)
                            if children is not None:
                                child = children.get(level)  # noqa: PLW2901  # as above
                                if child is not None:
                                    following.append(child)
                            elif word == level and child is not None:
                                following.append(child)
                            if plus is not None:
                                following.append(plus)
                        if not following:
                            break
                        nodes = following
                    else:
                        for _, _, _, _, below, here in nodes:
                            if here is not None:
                                hits.append(here)
                            if below is not None:
                                hits.append(below)
                    break
            else:
                if here is not None:
                    hits.append(here)
                if below is not None:
                    hits.append(below)

        # One or two filters with one value each are the usual case, and need no sorting.
        if not hits:
            found: tuple[V, ...] = ()
        elif (count := len(hits)) == 1 and type(one := hits[0]) is tuple:
            found = (one[1],)
        elif count == 2 and type(one := hits[0]) is tuple and type(two := hits[1]) is tuple:
            found = (one[1], two[1]) if one[0] < two[0] else (two[1], one[1])
        else:
            found = _in_order(hits)
            if len(found) > _KEPT_VALUES:
                return found
        if len(cache) < self._cache_size:
            if len(topic) <= _KEPT_LENGTH:
                cache[topic] = found
        else:
            # As `BoundedCache` does; through one of those a hit took 10 ns more, a tenth.
            cache.clear()
        return found

    def filters(self) -> tuple[str, ...]:
        """Return each filter that has a value, in the order of its oldest value.

        Under the Emitter rules they end with a slash, however they were added.
        """
        with self._lock:
            ordered = sorted(
                (_age(entry), key)
                for kept in (self._exact, self._wild)
                for key, entry in kept.items()
            )
        return tuple(key for _, key in ordered)

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            self._exact = {}
            self._wild = {}
            self._root = _NOTHING
            self._forget()

    def __contains__(self, filter: object) -> bool:
        """Whether *filter* has a value."""
        if not isinstance(filter, str):
            return False
        key, path, _ = self._compile(filter)
        return key in (self._exact if path is None else self._wild)

    def __len__(self) -> int:
        """Return the number of filters that have a value."""
        return len(self._exact) + len(self._wild)

    def __repr__(self) -> str:
        return f"HandlerTrie({self._rule!r}, {len(self)} filters)"

    def _compile(self, filter: str) -> tuple[str, list[str] | None, bool]:
        """Return the filter's key, its path in the trie, and whether it is open below.

        The path is None for a filter that matches one topic only. In a path ``+`` is the
        wildcard; every other word is itself.
        """
        rule = self._rule
        if rule == "exact":
            return filter, None, False
        if rule == "mqtt":
            if "+" not in filter and "#" not in filter:
                return filter, None, False
            path = filter.split("/")
            if path[-1] == "#":
                return filter, path[:-1], True
            return filter, path, False
        key = _as_channel(filter)
        path = key.split("/")[:-1]
        if rule == "emitter":
            return key, path, True
        if path and path[-1] == "#":
            path[-1] = "+"
            return key, path, True
        return key, path if "+" in path else None, False

    def _put(self, path: list[str], open_end: bool, entry: _Entry[V] | None) -> None:
        """Put *entry* where *path* leads, or None for nothing there any more.

        Nodes on the way are replaced from the bottom up, until one holds the new one in
        a dictionary. Those that hold nothing any more are left out.
        """
        nodes: list[_Node[V]] = [self._root]
        for step in path:
            word, child, children, plus, _, _ = nodes[-1]
            if step == "+":
                found = plus
            elif children is not None:
                found = children.get(step)
            else:
                found = child if word == step else None
            nodes.append(_NOTHING if found is None else found)
        word, child, children, plus, below, here = nodes.pop()
        if open_end:
            below = entry
        else:
            here = entry
        node: _Node[V] = (word, child, children, plus, below, here)
        for step in reversed(path):
            parent = nodes.pop()
            made = None if node[1:] == _NOTHING[1:] else node
            word, child, children, plus, below, here = parent
            if step == "+":
                plus = made
            elif children is not None:
                if made is not None:
                    children[_shared(step)] = made
                    return
                del children[step]
                if children:
                    return
                children = None
            elif child is None or word == step:
                word, child = (_NO_WORD, None) if made is None else (_shared(step), made)
            elif made is not None:
                children = {word: child, _shared(step): made}
                word, child = _NO_WORD, None
            node = (word, child, children, plus, below, here)
        self._root = node

    def _forget(self) -> None:
        """Drop the results kept so far; to be called when a change is complete."""
        # A new dictionary even if this one is empty: a thread inside match() may be about
        # to put into it what it found before the change.
        self._cache = {}


class _Many(Generic[V]):
    """The values of a filter with several, by name, with their places in the order."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: dict[Hashable, tuple[int, V]]) -> None:
        self.pairs = pairs


# An entry of a filter: a place in the order and a value. One value is by far the most
# frequent number, so it does without a dictionary.
_Entry: TypeAlias = "tuple[int, V] | _Many[V]"

# One level of the filters that share what stands before it:
#   word and child      the only literal child; comparing its word is faster than hashing the
#                       topic's, and most nodes have no second
#   children            all literal children, once there are two; word and child are then empty
#   plus                the child for any level
#   below               the filter that ends here and is open: this topic and all under it
#   here                the filter that ends here
# A node is never changed, except that its dictionary is: a reader that holds one sees one
# state of it, whatever other threads do.
_Node: TypeAlias = "tuple[str, _Link[V], dict[str, _Node[V]] | None, _Link[V], _Slot[V], _Slot[V]]"
_Link: TypeAlias = "_Node[V] | None"
_Slot: TypeAlias = "_Entry[V] | None"
_NO_WORD: Final = "/"  # is no level of any topic
_NOTHING: Final = (_NO_WORD, None, None, None, None, None)


def _as_channel(text: str) -> str:
    """Return a filter or topic as Emitter writes it; no text at all is the root."""
    return text if not text or text.endswith("/") else f"{text}/"


def _in_order(hits: list[_Entry[V]]) -> tuple[V, ...]:
    """Return the values of all *hits* by age."""
    pairs: list[tuple[int, Any]] = []
    for entry in hits:
        if isinstance(entry, tuple):
            pairs.append(entry)
        else:
            pairs.extend(entry.pairs.values())
    # The first items of pairs all differ, so values are never compared.
    pairs.sort()
    return tuple([value for _, value in pairs])


def _age(entry: _Entry[V]) -> int:
    return entry[0] if isinstance(entry, tuple) else next(iter(entry.pairs.values()))[0]


class _SameObject:
    """Stands for a value that cannot be a key: equal only to that very object."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _name(value: Hashable) -> Hashable:
    """Return the identity of *value* as a key."""
    try:
        hash(value)
    except TypeError:
        return _SameObject(value)
    return value


# Filters of one program have few different levels. Nodes share the text of theirs: less
# memory, and comparing two of the same object reads less of it. sys.intern would keep a
# peer's words until the process ends, on some versions of Python.
_words: Final = BoundedCache[str, str](32768)
_WORD_LENGTH = 64


def _shared(word: str) -> str:
    if len(word) > _WORD_LENGTH:
        return word
    return _words.get(word) or _words.keep(word, word)
