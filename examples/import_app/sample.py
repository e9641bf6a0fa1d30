"""Prints a file of orders: `python sample.py 10000 > orders.csv`."""

import csv
import random
import sys
from collections.abc import Iterator


def rows(count: int) -> Iterator[tuple[str, str, int, str]]:
    """Yield orders of a hundred customers, of which a few are large."""
    chance = random.Random(1)
    customers = [f"Customer {number}" for number in range(1, 101)]
    weights = [1 / number for number in range(1, 101)]
    for customer in chance.choices(customers, weights, k=count):
        item = chance.choice(["kettle", "lamp", "mug", "teapot"])
        yield customer, item, chance.randint(1, 9), f"{chance.randint(100, 9999) / 100:.2f}"


if __name__ == "__main__":
    writer = csv.writer(sys.stdout)
    writer.writerow(["customer", "item", "quantity", "price"])
    writer.writerows(rows(int(sys.argv[1])))
