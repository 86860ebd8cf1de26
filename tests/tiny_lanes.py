"""The queues of a GPU for tests on a CPU: see qzo.model.stream.Lanes."""

import random

import torch

GARBAGE = -1


class AtOnce:
    """Everything runs when it is launched: a layer's codes are overwritten as early as they may be."""

    def __init__(self):
        self.fetched = self.stored = 0

    def capturing(self):
        return False

    def passed(self):
        return None

    def wait(self, event):
        pass

    def finish(self):
        pass

    def fetch(self, target, source, after):
        self.fetched += 1
        target.copy_(source)
        return None

    def store(self, target, source, after):
        self.stored += 1
        target.copy_(source)
        return None

    def move(self, target, source):
        target.copy_(source)


class Queues:
    """Two queues that run when `run` is called, in any order that the events between them allow; a captured list runs per replay.

    A copy leaves garbage while it is under way, and looks at its source twice, as a use does: whatever may overlap it is noticed.
    """

    def __init__(self, seed=0, **broken):
        self.rng, self.broken = random.Random(seed), broken
        self.queues = {"compute": [], "side": [], "back": [], "branch": [], "branch back": []}
        self.captured, self.copies, self.wrong, self.events = None, [], 0, 0
        self.there = set()  # events that were reached

    def capturing(self):
        return self.captured is not None

    def put(self, queue, *operation):
        (self.queues if self.captured is None else self.captured)[queue].append(operation)

    def event(self, queue):
        self.events += 1
        self.put(queue, "record", (self.capturing(), self.events))
        return self.capturing(), self.events

    def await_event(self, queue, event):
        assert event[0] == self.capturing(), "an event of another capture, or of none"
        if not self.broken.get(queue):
            self.put(queue, "wait", event)

    def copied(self, queue, target, source):
        seen = torch.empty_like(source)
        self.put(queue, "begin", target, source, seen)
        self.put(queue, "end", target, source, seen)

    def passed(self):
        return self.event("compute")

    def wait(self, event):
        self.await_event("compute", event)

    def fetch(self, target, source, after):
        for event in after:
            self.await_event("side", event)
        self.copied("side", target, source)
        self.copies.append(len(source))
        return self.event("side")

    def store(self, target, source, after):
        self.await_event("back", after)
        self.copied("back", target, source)
        return self.event("back")

    def finish(self):
        assert not self.capturing()
        self.run("compute")

    def move(self, target, source):
        self.copied("compute", target, source)

    def use(self, codes, expected):
        self.put("compute", "use", codes, expected)
        self.put("compute", "use", codes, expected)

    def change(self, weight, amount):
        """Add to a tensor in place, in two steps: whatever reads it meanwhile sees garbage."""
        self.add(weight, GARBAGE)
        self.add(weight, amount)
        self.add(weight, -GARBAGE)

    def add(self, tensor, amount):
        self.put("compute", "add", tensor, amount)

    def run(self, until=None):
        """All that is queued, or what is queued in `until`: the head of a queue is held up by events that are not there yet, and by nothing else."""
        queues = list(self.queues.values())
        while any(queues if until is None else self.queues[until]):
            ready = [q for q in queues if q and (q[0][0] != "wait" or q[0][1] in self.there)]
            kind, *values = self.rng.choice(ready).pop(0)
            if kind == "record":
                self.there.add(values[0])
            elif kind == "use":
                self.wrong += not torch.equal(*values)
            elif kind == "begin":
                values[2].copy_(values[1])
                values[0].fill_(GARBAGE)
            elif kind == "end":
                self.wrong += not torch.equal(*values[1:])
                values[0].copy_(values[1])
            elif kind == "add":
                values[0].add_(values[1])

    def capture(self, work):
        """What `work` launches, to be replayed; the side queue must have been joined."""
        self.captured = {"compute": [], "side": [], "back": []}
        try:
            work()
            graph = self.captured
            assert joined_all(graph), "a capture that is not joined"
        finally:
            self.captured = None
        return graph

    def replay(self, graph):
        """Its operations after what the compute queue holds; its own branch knows nothing of the side queue."""
        self.events += 1
        for queue, operations in zip(("compute", "branch", "branch back"), graph.values(), strict=True):
            again = [(op[0], (*op[1], self.events)) if op[0] in ("record", "wait") else op for op in operations]
            self.queues[queue] += again


def joined_all(graph):
    """Whether the compute queue has waited, itself or through the side queue, for the last operation of the others."""
    waited = {value for kind, *values in graph["compute"] if kind == "wait" for value in values}
    last = next((i for i in reversed(range(len(graph["side"]))) if graph["side"][i][0] == "record" and graph["side"][i][1] in waited), -1)
    waited |= {value for kind, *values in graph["side"][: last + 1] if kind == "wait" for value in values}
    return last == len(graph["side"]) - 1 and (not graph["back"] or graph["back"][-1][1] in waited)
