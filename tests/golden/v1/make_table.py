"""Write table.csv and table.parquet (400 rows) beside this script, deterministically: no random module, an LCG only.

Columns: income, debt, age, ratio (numbers; income, debt and ratio have missing cells), region (text, 4 values, some
missing), branch (number that is a code: data.categorical), outcome (text target, 3 classes), part (split column).
"""

import csv
from pathlib import Path

import polars as pl

HERE = Path(__file__).parent
state = 12345


def draw() -> float:
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
    return (state >> 33) / 2**31


rows = []
for number in range(400):
    income = round(20 + 80 * draw(), 2)
    debt = round(50 * draw() ** 2, 3)
    age = 18 + int(60 * draw())
    ratio = round(debt / income, 4)
    region = ("north", "south", "east", "west")[int(4 * draw())]
    branch = (101, 205, 309, 412, 555)[int(5 * draw())]
    score = 2 * ratio - 0.01 * (income - 60) + (0.3 if region == "west" else 0) + (0.2 if branch == 309 else 0)
    score += 0.6 * (draw() - 0.5)
    outcome = "bad" if score > 0.85 else "late" if score > 0.45 else "good"
    part = ("train", "train", "train", "train", "train", "train", "train", "valid", "test", "test")[number * 7 % 10]
    gone = [draw() < chance for chance in (0.06, 0.04, 0.08, 0.03)]
    rows.append(
        {
            "income": None if gone[0] else income,
            "debt": None if gone[1] else debt,
            "age": age,
            "ratio": None if gone[2] else ratio,
            "region": None if gone[3] else region,
            "branch": branch,
            "outcome": outcome,
            "part": part,
        }
    )

with (HERE / "table.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
pl.DataFrame(rows, infer_schema_length=None).write_parquet(HERE / "table.parquet")
