"""A queue: four colours go in, and come out until it is empty."""

from procession import Queue

if __name__ == "__main__":
    colors = ["red", "green", "blue", "black"]
    queue = Queue()

    print("pushing items to queue:")
    for number, color in enumerate(colors, start=1):
        print("item no:", number, color)
        queue.put(color)

    print("popping items from queue:")
    number = 0
    while not queue.empty():
        print("item no:", number, queue.get())
        number += 1
