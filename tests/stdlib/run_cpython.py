#!/usr/bin/env python3
"""Run CPython's own multiprocessing tests against another module.

    run_cpython.py --module procession --method spawn [--python EXE] [--path DIR]

The tests are the _test_multiprocessing.py of the interpreter EXE (default: this
one), copied to a scratch folder with the module put in the place of
multiprocessing (see _conf/build_cpython.py), one process per test class, a
time limit per test.  `--module multiprocessing` gives the baseline.

The last line is 'N passed, N failed, N skipped' over the tests that count: all
but those that known.txt marks as asserting on the standard library's internals
(`impl`), on its design (`design`) or on what is different on purpose (`changed`), or
as never touching the module (`stdlib`),
which are counted on lines of their own.  Exit status 1 when a counted test
failed that is not marked flaky.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from _conf import suite, watchdog


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--module", required=True)
    p.add_argument("--method", required=True, choices=("fork", "forkserver", "spawn"))
    p.add_argument(
        "--tests",
        choices=("multiprocessing", "concurrent_futures"),
        default="multiprocessing",
        help="whose tests: _test_multiprocessing.py, or test_concurrent_futures with the module's ProcessPoolExecutor",
    )
    p.add_argument("--python", default=sys.executable, metavar="EXE")
    p.add_argument(
        "--path", action="append", default=[], metavar="DIR", help="put DIR on PYTHONPATH (where the module is)"
    )
    p.add_argument(
        "--helpers",
        choices=("auto", "stdlib"),
        default="auto",
        help="auto: the module's own submodules (queues, pool, ...) where it has "
        "them, else the stdlib's; stdlib: always the stdlib's",
    )
    p.add_argument(
        "--types",
        default="processes,manager,misc",
        help="which of processes,manager,misc,threads (default: all but threads, which test multiprocessing.dummy)",
    )
    p.add_argument("-k", dest="select", metavar="REGEX", help="only tests whose id matches")
    p.add_argument("--ids", metavar="FILE", help="only the tests named in FILE, one a line")
    p.add_argument("--timeout", type=float, default=120, help="seconds a test may be silent (120)")
    p.add_argument(
        "--retries",
        type=int,
        default=1,
        help="run a failed test alone up to N times more; a pass counts, and is named as flaky (1)",
    )
    p.add_argument("--jobs", type=int, default=1, help="test classes at once (1; timings suffer with more)")
    p.add_argument("--known", metavar="FILE", help="default: known.txt, or known_concurrent_futures.txt")
    p.add_argument("--all", action="store_true", help="count every test, whatever known.txt says")
    p.add_argument("--json", metavar="FILE", help="write everything here")
    p.add_argument("--save", metavar="FILE", help="write id -> outcome here")
    p.add_argument("--compare", metavar="FILE", help="name the tests that pass there and fail here")
    p.add_argument("--keep", metavar="DIR", help="keep the copy and the logs in DIR")
    p.add_argument("-q", "--quiet", action="store_true")
    p.add_argument("-v", "--verbose", action="store_true", help="print the text of each failure")
    args = p.parse_args()
    watchdog.default_sigint()

    scratch = args.keep or tempfile.mkdtemp(prefix="conformance-")
    try:
        return run(args, os.path.abspath(scratch))
    finally:
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def run(args, scratch):
    try:
        copy = suite.Copy(
            args.module, scratch, tests=args.tests, python=args.python, path=args.path, helpers=args.helpers
        )
    except suite.NotHereError as e:
        raise SystemExit(str(e)) from None
    meta = dict(copy.meta, method=args.method)
    types = args.types.split(",")
    ids = [i for i in copy.ids(args.method) if suite.kind(i) in types]
    if args.select:
        ids = [i for i in ids if re.search(args.select, i)]
    if args.ids:
        with open(args.ids) as f:
            wanted = set(f.read().split())
        ids = [i for i in ids if i in wanted]
    known = suite.read_known(args.known or suite.known(args.tests), args.method, copy.version)

    work = queue.Queue()
    for name, members in suite.by_class(ids).items():
        work.put((name, members))
    results, fixtures, env_changed, leftover = {}, {}, [], 0
    flaky = {}
    lock = threading.Lock()
    start = time.monotonic()

    def one(name, members):
        return copy.run(args.method, name, members, timeout=args.timeout)

    def drain():
        nonlocal leftover
        while True:
            try:
                name, members = work.get_nowait()
            except queue.Empty:
                return
            group = one(name, members)
            for _ in range(args.retries):
                for i in members:
                    if group.results[i]["outcome"] in watchdog.BAD:
                        again = one(name, [i])
                        if again.results[i]["outcome"] == "pass":
                            with lock:
                                flaky[i] = group.results[i]
                            group.results[i] = again.results[i]
            with lock:
                results.update(group.results)
                for where, what in group.fixtures.items():
                    fixtures[f"{name}.{where}" if where.startswith("(") else where] = what
                if group.env_changed:
                    env_changed.append(name)
                leftover += group.leftover
                if not args.quiet:
                    p, f, s = watchdog.count(r["outcome"] for r in group.results.values())
                    print(
                        f"  {name}: {p} ok, {f} bad, {s} skipped, {group.seconds:.1f} s"
                        + (" [environment altered]" if group.env_changed else ""),
                        file=sys.stderr,
                        flush=True,
                    )

    threads = [threading.Thread(target=drain) for _ in range(max(1, args.jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seconds = time.monotonic() - start

    groups = {"counted": {}, "impl": {}, "design": {}, "changed": {}, "stdlib": {}}
    flaky_known = {}
    for i in ids:
        category, reason = suite.category_of(i, known)
        where = "counted" if args.all else suite.group_of(category, meta["own_submodules"])
        groups[where][i] = results[i]
        if category == "flaky":
            flaky_known[i] = reason

    if args.json:
        with open(args.json, "w") as f:
            json.dump(
                {
                    "meta": dict(meta, seconds=round(seconds, 1)),
                    "tests": results,
                    "fixtures": fixtures,
                    "env_changed": sorted(env_changed),
                    "flaky": flaky,
                    "leftover_processes": leftover,
                    "category": {i: suite.category_of(i, known)[0] for i in ids},
                },
                f,
                indent=1,
            )
    if args.save:
        with open(args.save, "w") as f:
            json.dump(
                {
                    "meta": {
                        "module": args.module,
                        "method": args.method,
                        "python": meta["python"],
                        "seconds": round(seconds, 1),
                    },
                    "tests": {i: results[i]["outcome"] for i in sorted(ids)},
                },
                f,
                indent=0,
                sort_keys=True,
            )
            f.write("\n")

    names = meta["names"]
    print(
        f"{args.module} {meta['version'] or ''} on CPython {meta['python']}, {args.method}, "
        f"{seconds:.0f} s; helper modules of its own: {' '.join(meta['own_submodules']) or 'none'}"
    )
    if args.module != "multiprocessing":
        print(
            f"  {len(names['own'])} public names are its own, {len(names['stdlib'])} the standard "
            f"library's: {' '.join(names['stdlib'])}"
        )
        if names["missing"]:
            print(f"  missing: {' '.join(names['missing'])}")
    by_kind = {}
    for i, r in groups["counted"].items():
        by_kind.setdefault(suite.kind(i), []).append(r["outcome"])
    for k, outcomes in by_kind.items():
        print(f"  {k:10} " + watchdog.line(*watchdog.count(outcomes)))
    for title, where in (
        ("not counted, asserts on internals", "impl"),
        ("not counted, a matter of design", "design"),
        ("not counted, different on purpose", "changed"),
        ("not counted, does not touch the module", "stdlib"),
    ):
        if groups[where]:
            print(f"  {title}: " + watchdog.line(*watchdog.count(r["outcome"] for r in groups[where].values())))
            for i, r in groups[where].items():
                if r["outcome"] in watchdog.BAD:
                    print(f"    {r['outcome']:5} {i}")
    if flaky:
        print("  passed when run again: " + " ".join(sorted(flaky)))
    if env_changed:
        print("  left processes or threads behind: " + " ".join(sorted(env_changed)))
    if leftover:
        print(f"  processes ended by the harness: {leftover}")
    bad = {i: r for i, r in groups["counted"].items() if r["outcome"] in watchdog.BAD}
    unexpected = [i for i in bad if i not in flaky_known]
    if args.compare:
        with open(args.compare) as f:
            base = json.load(f)["tests"]
        lost = [i for i in groups["counted"] if base.get(i) == "pass" and results[i]["outcome"] != "pass"]
        both = [i for i in groups["counted"] if base.get(i) == "pass"]
        print(f"  of {len(both)} counted tests that pass in the baseline, {len(both) - len(lost)} pass here")
        for i in lost:
            if results[i]["outcome"] == "skip":
                print(f"    skip  {i}  {results[i]['text'][:100]}")
    if bad or fixtures:
        print("failing:")
    alike = {}
    for i, r in bad.items():
        alike.setdefault((i.split(".")[0], r["outcome"], watchdog.short(r["text"])), []).append(i)
    for (name, outcome, text), members in alike.items():
        if len(members) > 3 and not args.verbose:
            print(
                f"  {outcome:5} {name}: {len(members)} tests ({members[0].split('.')[1]}, "
                f"{members[1].split('.')[1]}, ...)  {text}"
            )
            continue
        for i in members:
            print(f"  {outcome:5} {i}  {text}" + (" [known flaky]" if i in flaky_known else ""))
            if args.verbose:
                print("\n".join("        " + l for l in bad[i]["text"].splitlines()))
    for where, r in fixtures.items():
        print(f"  {r['outcome']:5} {where}  {watchdog.short(r['text'])}")
        if args.verbose:
            print("\n".join("        " + l for l in r["text"].splitlines()))
    passed, failed, skipped = watchdog.count(r["outcome"] for r in groups["counted"].values())
    print(watchdog.line(passed, failed + len(fixtures), skipped))
    return 1 if unexpected or fixtures else 0


if __name__ == "__main__":
    sys.exit(main())
