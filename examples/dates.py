"""Dates as people write them, each with its ISO 8601 form: a task without end for seq2seq.py.

    "Tuesday, March 3rd '98"                         1998-03-03
    "the tird of march, nineteen ninety-eight"       1998-03-03
    "LE 3 MARS 1998"                                 1998-03-03
    "the day after Christmas 1998"                   1998-12-26
    "last day of February 2000"                      2000-02-29

Years lie in 1950..2049, so that two digits name one year. With slashes the month comes first
(3/4/98 is the fourth of March), with dots the day (3.4.98 is the third of April).
"""

from __future__ import annotations

import datetime
import random
from typing import NamedTuple

FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)

MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
    "diciembre",
}
WEEKDAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "de": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "es": "lunes martes miércoles jueves viernes sábado domingo",
}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth",
             "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}  # fmt: skip
HOLIDAYS = {  # month, day
    "New Year's Day": (1, 1), "Epiphany": (1, 6), "Valentine's Day": (2, 14),
    "St Patrick's Day": (3, 17), "April Fools' Day": (4, 1), "May Day": (5, 1),
    "Midsummer Day": (6, 24), "Independence Day": (7, 4), "Bastille Day": (7, 14),
    "Halloween": (10, 31), "All Saints' Day": (11, 1), "Armistice Day": (11, 11),
    "St Nicholas' Day": (12, 6), "Christmas Eve": (12, 24), "Christmas": (12, 25),
    "Boxing Day": (12, 26), "New Year's Eve": (12, 31),
}  # fmt: skip


class Date(NamedTuple):
    """A date in both forms, how it is written (one of ``KINDS``), whether a letter is wrong."""

    text: str
    iso: str
    kind: str
    typo: bool


def cardinal(n: int) -> str:
    """0..99 in words."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def ordinal(n: int) -> str:
    """1..31 in words: first, ..., thirty-first."""
    head, _, last = cardinal(n).rpartition("-")
    last = IRREGULAR.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return f"{head}-{last}" if head else last


def suffixed(n: int) -> str:
    """1..31 as 1st, 2nd, 3rd, 4th, ..., 31st."""
    ending = "th" if n in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def year_in_words(year: int, r: random.Random) -> str:
    """1950..2049: nineteen fifty, two thousand and four, twenty thirteen."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010 or (century == 20 and r.random() < 0.3):
        return "two thousand" + (r.choice([" and ", " "]) + cardinal(rest) if rest else "")
    return f"{cardinal(century)} {cardinal(rest)}"


def short_or_long(year: int, r: random.Random) -> str:
    return r.choice([f"{year}", f"{year}", f"{year % 100:02}", f"'{year % 100:02}"])


def weekday(day: datetime.date, language: str, r: random.Random) -> str:
    """Its weekday in front of it, or nothing."""
    name = WEEKDAYS[language].split()[day.weekday()]
    return r.choice([f"{name}, ", f"{name} ", f"{name[:3]} "]) if r.random() < 0.35 else ""


def in_numbers(day: datetime.date, r: random.Random) -> str:
    y, m, d = day.year, day.month, day.day
    y2 = f"{y % 100:02}"
    return r.choice(
        [
            f"{m}/{d}/{y}", f"{m}/{d}/{y2}", f"{m:02}/{d:02}/{y2}", f"{d}.{m}.{y}", f"{d}.{m}.{y2}",
            f"{d:02}.{m:02}.{y}", f"{y}/{m}/{d}", f"{y}{m:02}{d:02}", f"{y}-{m}-{d}",
        ]
    )  # fmt: skip


def in_english(day: datetime.date, r: random.Random) -> str:
    month = MONTHS["en"].split()[day.month - 1]
    month = r.choice([month, month, month[:3], month[:3] + "."])
    d, y = r.choice([str(day.day), suffixed(day.day)]), short_or_long(day.year, r)
    form = r.choice(
        ["{m} {d}, {y}", "{m} {d} {y}", "{d} {m} {y}", "{d}-{m}-{y}", "{d} of {m}, {y}",
         "the {d} of {m} {y}", "{y}, {m} {d}"]
    )  # fmt: skip
    if form.startswith("{y}"):
        y = str(day.year)  # two digits in front would be a day
    return weekday(day, "en", r) + form.format(m=month, d=d, y=y)


def in_other_language(day: datetime.date, r: random.Random) -> str:
    language = r.choice(["de", "fr", "es"])
    month = MONTHS[language].split()[day.month - 1]
    d, y = str(day.day), day.year
    if language == "de":
        form = r.choice([f"{d}. {month} {y}", f"den {d}. {month} {y}", f"{d}. {month[:3]}. {y}"])
    elif language == "fr":
        d = "1er" if day.day == 1 else d
        form = r.choice([f"{d} {month} {y}", f"le {d} {month} {y}"])
    else:
        form = r.choice([f"{d} de {month} de {y}", f"el {d} de {month} de {y}"])
    return weekday(day, language, r) + form


def in_words(day: datetime.date, r: random.Random) -> str:
    month, d = MONTHS["en"].split()[day.month - 1], ordinal(day.day)
    year = r.choice([year_in_words(day.year, r), year_in_words(day.year, r), str(day.year)])
    form = r.choice(
        [f"the {d} of {month}, {year}", f"{month} the {d}, {year}", f"{month} {d} {year}"]
    )
    return weekday(day, "en", r) + form


def by_reckoning(day: datetime.date, r: random.Random) -> tuple[str, datetime.date]:
    """A feast, the day before or after it, or the last day of a month; and the day meant."""
    if r.random() < 0.3:
        after = datetime.date(day.year + day.month // 12, day.month % 12 + 1, 1)
        last = after - datetime.timedelta(1)
        month = MONTHS["en"].split()[day.month - 1]
        form = r.choice(["last day of {} {}", "the last of {} {}", "end of {}, {}"])
        return form.format(month, short_or_long(day.year, r)), last
    name, (m, d) = r.choice(list(HOLIDAYS.items()))
    shift, words = r.choice(
        [(0, ""), (0, ""), (-1, "the day before "), (1, "the day after "), (-1, "eve of ")]
    )
    meant = datetime.date(day.year, m, d) + datetime.timedelta(shift)
    if not FIRST <= meant <= LAST:
        return by_reckoning(day, r)
    return f"{words}{name} {short_or_long(day.year, r)}", meant


KINDS = {
    "numbers": in_numbers,
    "English": in_english,
    "other languages": in_other_language,
    "in words": in_words,
    "by reckoning": by_reckoning,
}


def mistyped(text: str, r: random.Random) -> str:
    """The text with one letter of a longer word left out, doubled, swapped or wrong."""
    places = [i for i in range(len(text) - 3) if text[i : i + 4].isalpha()]
    if not places:
        return text
    i = r.choice(places) + 1
    a, b = text[i], text[i + 1]
    change = r.choice([b, a + a + b, b + a, r.choice("abcdefghijklmnopqrstuvwxyz") + b])
    return text[:i] + change + text[i + 2 :]


def random_date(r: random.Random) -> Date:
    """Any day of the century, written in any way; letters in a fifth of them are mistyped."""
    day = FIRST + datetime.timedelta(r.randrange((LAST - FIRST).days + 1))
    kind = r.choice(list(KINDS))
    text = KINDS[kind](day, r)
    if isinstance(text, tuple):
        text, day = text
    text = r.choice(["", "", "", "on ", "due ", "dated "]) + text
    text = r.choice([str, str, str.lower, str.upper])(text)
    clean = text
    if r.random() < 0.2:
        text = mistyped(text, r)
    return Date(text, day.isoformat(), kind, text != clean)


def by_dateutil(text: str) -> str:
    """What a parser written by hand makes of it: ISO, or "" where it gives up.

    python-dateutil, which matplotlib brings along, told this task's conventions: the century of
    two digits, day before month with dots.
    """
    from dateutil import parser

    class Info(parser.parserinfo):
        def convertyear(self, year: int, century_specified: bool = False) -> int:
            return year + (1900 if year >= 50 else 2000) if year < 100 else year

    try:
        found = parser.parse(
            text, Info(), fuzzy=True, dayfirst="." in text, default=datetime.datetime(2000, 1, 1)
        )
    except (ValueError, OverflowError):
        return ""
    return found.date().isoformat()
