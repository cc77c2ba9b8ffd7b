"""Four processes: one prints the default, three print what they are given."""

from procession import Process


def print_func(continent="Asia"):
    print("The name of continent is :", continent)


if __name__ == "__main__":
    names = ["America", "Europe", "Africa"]
    procs = []

    proc = Process(target=print_func)  # no argument: the default
    procs.append(proc)
    proc.start()

    for name in names:
        proc = Process(target=print_func, args=(name,))
        procs.append(proc)
        proc.start()

    for proc in procs:
        proc.join()
