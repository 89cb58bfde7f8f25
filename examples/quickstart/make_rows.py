"""The quickstart's rows, made once from the `holidays` package (MIT) with a fixed seed.

    pip install holidays==0.109
    python examples/quickstart/make_rows.py

One row asks for the date of a holiday and brings two calendar sources as contexts: the right one,
and a distractor, nearly always the same holiday on another date (another country or another year).
The response is one JSON object. Countries of one file never occur in another, not even as
distractors. The files are shipped, so that nobody has to run this; the same `holidays` version
writes the same bytes.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path

import holidays
from holidays.registry import COUNTRIES

HOLIDAYS_VERSION = "0.109"
SEED = 20260604
YEARS = range(2020, 2031)
ROWS = {"train": 600, "validation": 60, "test": 100}
COUNTRY_SHARES = {"train": 0.65, "validation": 0.12, "test": 0.23}
SPELLINGS = {
    "dr_congo": "DR Congo",
    "guinea_bissau": "Guinea-Bissau",
    "hongkong": "Hong Kong",
    "timor_leste": "Timor-Leste",
}
CLEAN_NAME = re.compile(r"[A-Z][A-Za-z' -]{3,31}")
DULL_NAMES = {"Public Holiday", "Additional Holiday", "Bank Holiday", "Special Holiday"}
QUESTIONS: tuple[str, ...] = (
    "When is {holiday} in {country} in {year}?",
    "On which date does {country} observe {holiday} in {year}?",
    "What is the {year} date of {holiday} in {country}?",
    "Which day is {holiday} {year} in {country}?",
    "I will be in {country} in {year}. When is {holiday}?",
)
QUESTIONS_WITHOUT_YEAR = (
    "When is {holiday} in {country}?",
    "On which date does {country} observe {holiday}?",
    "What is the date of {holiday} in {country}?",
)
SOURCES = (
    "Public holidays in {country}: {holiday}, {date}.",
    "{country}, official calendar. {holiday}: {date}.",
    "In {country}, {holiday} is observed on {date}.",
    "{country} holiday notice: {holiday} falls on {date}, offices are closed.",
)
Calendar = dict[str, date]


@dataclass(frozen=True, kw_only=True)
class Page:
    """One country's holidays in one year, by name."""

    country: str
    year: int
    calendar: Calendar


def country_name(key: str) -> str:
    """`isle_of_man` -> `Isle of Man`."""
    small = {"and", "of", "the"}
    words = (word if word in small else word.capitalize() for word in key.split("_"))
    return SPELLINGS.get(key, " ".join(words))


@cache
def page(key: str, year: int) -> Page:
    """The holidays whose English name is plain and occurs once in the year."""
    code = COUNTRIES[key][1]
    language = "en_US" if "en_US" in holidays.list_localized_countries().get(code, []) else None
    days = holidays.country_holidays(code, years=year, language=language)
    named = [(name, day) for day, names in sorted(days.items()) for name in [names.split("; ")[0]]]
    counts = Counter(name for name, _ in named)
    calendar = {
        name: day for name, day in named if counts[name] == 1 and CLEAN_NAME.fullmatch(name) and name not in DULL_NAMES
    }
    return Page(country=country_name(key), year=year, calendar=calendar)


def usable_countries() -> list[str]:
    """The registry's keys with a short plain name and at least five plain holidays every year."""
    return sorted(
        key
        for key in COUNTRIES
        if len(country_name(key)) <= 24 and all(len(page(key, year).calendar) >= 5 for year in YEARS)
    )


def split_countries(rng: random.Random) -> dict[str, list[str]]:
    """File name -> its countries; no country is in two files."""
    keys = usable_countries()
    rng.shuffle(keys)
    parts: dict[str, list[str]] = {}
    start = 0
    for name, share in COUNTRY_SHARES.items():
        stop = start + round(share * len(keys))
        parts[name] = sorted(keys[start:stop])
        start = stop
    return parts


def rivals(asked: Page, holiday: str, countries: list[str]) -> list[Page]:
    """Other countries that have this holiday in this year on another date."""
    pages = [page(key, asked.year) for key in countries]
    return [p for p in pages if p.calendar.get(holiday, asked.calendar[holiday]) != asked.calendar[holiday]]


def choose_holiday(asked: Page, countries: list[str], rng: random.Random) -> str:
    """A holiday of the page; one that some other country has on another date where possible."""
    names = sorted(asked.calendar)
    contested = [name for name in names if rivals(asked, name, countries)]
    return rng.choice(contested or names)


def source_text(source: Page, holiday: str, rng: random.Random) -> str:
    """What the page says about `holiday`, or about another day where it has no such holiday."""
    name = holiday if holiday in source.calendar else rng.choice(sorted(source.calendar))
    day = source.calendar[name].isoformat()
    return rng.choice(SOURCES).format(country=source.country, holiday=name, date=day)


def make_row(key: str, countries: list[str], rng: random.Random) -> dict[str, object]:
    """One row `input`, `contexts`, `response` about a country of `countries`."""
    asked = page(key, rng.choice(YEARS))
    holiday = choose_holiday(asked, countries, rng)
    other_year = page(key, asked.year + rng.choice((-1, 1)))
    if rng.random() < 0.2 and holiday in other_year.calendar:
        distractor, wordings = other_year, QUESTIONS
    else:
        others = [page(other, asked.year) for other in countries if other != key]
        distractor = rng.choice(rivals(asked, holiday, countries) or others)
        wordings = QUESTIONS + QUESTIONS_WITHOUT_YEAR
    contexts = [source_text(source, holiday, rng) for source in (asked, distractor)]
    rng.shuffle(contexts)
    answer = {
        "country": asked.country,
        "holiday": holiday,
        "date": asked.calendar[holiday].isoformat(),
        "year": asked.year,
    }
    question = rng.choice(wordings).format(**answer)
    return {"input": question, "contexts": contexts, "response": json.dumps(answer)}


def make_rows(countries: list[str], num_rows: int, rng: random.Random) -> list[dict[str, object]]:
    """`num_rows` different rows, going round the countries in random order."""
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < num_rows:
        for key in rng.sample(countries, len(countries)):
            row = make_row(key, countries, rng)
            rows.setdefault(f"{row['input']} {row['response']}", row)
    return list(rows.values())[:num_rows]


def main() -> int:
    """Write the three files; 2 when another version of `holidays` is installed."""
    parser = argparse.ArgumentParser(description="Make the quickstart's rows.")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    folder: Path = parser.parse_args().to
    version = metadata.version("holidays")
    if version != HOLIDAYS_VERSION:
        print(
            f"holidays {version} is installed and has other dates: pip install holidays=={HOLIDAYS_VERSION}",
            file=sys.stderr,
        )
        return 2
    rng = random.Random(SEED)
    for name, countries in split_countries(rng).items():
        rows = make_rows(countries, ROWS[name], rng)
        lines = (json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(rows)} rows from {len(countries)} countries")
    print(f"made with holidays {version}, seed {SEED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
