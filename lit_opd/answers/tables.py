r"""The words and signs that the other files look up. All Unicode here means what the LaTeX beside it means."""

from __future__ import annotations

from fractions import Fraction

SIGNS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2015": "-", "\ufe63": "-",
    "\uff0d": "-", "\u207a": "^{+}", "\u00d7": "\\times ", "\u2715": "\\times ", "\u2a2f": "\\times ", "\u00b7": "\\cdot ",
    "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u2022": "\\cdot ", "\u2217": "\\cdot ", "\u00f7": "\\div ", "\u2215": "/",
    "\u2044": "/", "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ",
    "\u2a7e": "\\ge ", "\u2266": "\\le ", "\u2267": "\\ge ", "\u2260": "\\ne ", "\u2248": "\\approx ", "\u2261": "\\equiv ",
    "\u221e": "\\infty ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u2216": "\\setminus ",
    "\u2205": "\\emptyset ", "\u00d8": "\\emptyset ", "\u2300": "\\emptyset ", "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}",
    "\u2115": "\\mathbb{N}", "\u211a": "\\mathbb{Q}", "\u2102": "\\mathbb{C}", "\u00b0": "^\\circ ", "\u00ba": "^\\circ ",
    "\u2103": "^\\circ C", "\u2109": "^\\circ F", "\u2220": "\\angle ", "\u25b3": "\\triangle ", "\u2206": "\\triangle ",
    "\u27e8": "\\langle ", "\u27e9": "\\rangle ", "\u2032": "'", "\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"',
    "\u2026": "\\ldots ", "\u22ef": "\\ldots ", "\u3001": ",", "\u3002": ".", "\u060c": ",", "\u2261\u0338": "\\ne ",
    "\u00b5": "\\mu ", "\u0131": "i", "\u2113": "l", "\u2228": "\\lor ", "\u2227": "\\land ", "\u2223": "|",
}  # fmt: skip
INVISIBLE = dict.fromkeys(
    [*range(9), *range(0x0E, 0x20), 0x7F, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xAD, 0x200E, 0x200F], ""
)
GREEK = dict(
    zip(
        "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03b9\u03ba\u03bb\u03bc\u03bd\u03be\u03c0\u03c1\u03c3\u03c4\u03c5\u03c6\u03c7\u03c8\u03c9"
        "\u0393\u0394\u0398\u039b\u039e\u03a0\u03a3\u03a6\u03a8\u03a9\u03d5\u03f5",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
        "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi epsilon".split(),
        strict=True,
    )
)
RAISED = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f\u2071", "0123456789-ni", strict=True)
)
LOWERED = dict(zip("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u2099", "0123456789n", strict=True))

# names that people write without a backslash
COMMAND_WORDS = {
    name: f"\\{name} " for name in "sin cos tan cot csc sinh cosh tanh arcsin arccos arctan log ln exp gcd".split()
}
COMMAND_WORDS |= {
    name: f"\\{name} " for name in "lim max min sec alpha beta gamma delta theta lambda sigma omega phi pi".split()
}
COMMAND_WORDS |= {"sqrt": "\\sqrt", "infinity": "\\infty ", "inf": "\\infty ", "oo": "\\infty ", "infty": "\\infty "}

# what may be dropped in front of the answer
LEADING_WORDS = frozenset(
    "the a an ans final answer answers solution solutions result is are therefore thus hence so value equals equal to we get "
    "have our required correct option choice there total of number".split()
)

MAGNITUDES = {
    "hundred": Fraction(100), "hundreds": Fraction(100), "thousand": Fraction(1000), "thousands": Fraction(1000),
    "million": Fraction(10**6), "millions": Fraction(10**6), "billion": Fraction(10**9), "billions": Fraction(10**9),
    "trillion": Fraction(10**12), "trillions": Fraction(10**12), "dozen": Fraction(12), "dozens": Fraction(12),
}  # fmt: skip

# a phrase with one of these says another number, a bound, a time of day or nothing: it is no unit
NOT_IN_UNITS = frozenset(
    "and or nor to through not no none never more less least most fewer greater over under above below plus minus remainder mod "
    "modulo divided multiplied factorial am pm base bn mn tn mil half halves third thirds quarter quarters fourth fourths "
    "fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth "
    "thousandths score gross couple double triple twice thrice if when where for except about approximately roughly choose "
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety than but else otherwise only if undefined wrong false "
    "percentile imaginary prime noon midnight negative positive infinite infinity repeating".split()
    + list(MAGNITUDES)
    + [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "theta",
        "lambda",
        "sigma",
        "omega",
        "phi",
        "epsilon",
        "kappa",
        "zeta",
        "iota",
    ]
)
SMALL_WORDS = frozenset("of in on at an per sq cu each".split())

_UNITS = """
meter: m meter meters metre metres | kilometer: km kms kilometer kilometers kilometre kilometres
centimeter: cm cms centimeter centimeters centimetre centimetres | millimeter: mm millimeter millimeters millimetre millimetres
decimeter: dm decimeter decimeters | inch: in inch inches | foot: ft foot feet | yard: yd yds yard yards | mile: mi mile miles
gram: g gram grams gm | kilogram: kg kgs kilogram kilograms | milligram: mg milligram milligrams | ton: ton tons tonne tonnes
pound: lb lbs pound pounds | ounce: oz ounce ounces
second: s sec secs second seconds | minute: min mins minute minutes | hour: h hr hrs hour hours | day: day days
week: week weeks | month: month months | year: yr yrs year years
liter: L l liter liters litre litres | milliliter: ml mL milliliter milliliters millilitre millilitres
gallon: gal gallon gallons | quart: qt quart quarts | pint: pint pints | cup: cup cups
acre: acre acres | hectare: ha hectare hectares
degree: deg degs degree degrees | radian: rad rads radian radians
dollar: dollar dollars usd USD | cent: cent cents | euro: euro euros eur EUR
sterling: gbp GBP | yen: yen JPY | rupee: rs Rs rupee rupees INR
newton: N newton newtons | joule: J joule joules | kilojoule: kJ | watt: W watt watts | kilowatt: kW | volt: V volt volts
ohm: ohm ohms | hertz: Hz hertz | pascal: Pa pascal pascals | mole: mol mole moles | kelvin: kelvin
calorie: cal calorie calories
celsius: celsius Celsius | fahrenheit: fahrenheit Fahrenheit
"""
UNIT_NAMES = {
    word: name.strip()
    for entry in _UNITS.replace("\n", "|").split("|")
    if entry.strip()
    for name, words in [entry.split(":")]
    for word in words.split()
}
SPEEDS = {
    "mph": ("mile", "hour"),
    "kph": ("kilometer", "hour"),
    "kmh": ("kilometer", "hour"),
    "kmph": ("kilometer", "hour"),
}
ANY_MEASURE = frozenset("unit units".split())
NO_MEASURE = ANY_MEASURE | frozenset("st nd rd th".split())  # words that stand where a unit stands and measure nothing
PER_WORDS = frozenset("per an each every".split())  # "miles an hour", "dollars each week"
POWERS_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
BEFORE_INCH = ("sq", "square", "cu", "cubic", "per")  # after them "in" is no preposition, nor before these:
AFTER_INCH = ("long", "tall", "wide", "high", "thick", "deep", "apart", "of", "per", "squared", "cubed")
POWERS_BEHIND = {"squared": 2, "cubed": 3}
PERCENT_WORDS = frozenset("percent percents percentage pct".split())
CURRENCIES = {"\\$": "dollar", "\u20ac": "euro", "\u00a3": "sterling", "\u00a5": "yen", "\u20b9": "rupee"}
CENT_SIGN = "\u00a2"

# plain words of more than one letter that are no product of symbols
PLAIN_WORDS = frozenset("yes no odd even true false east west north south none all real numbers".split())
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hex": 16, "hexadecimal": 16,
}  # fmt: skip
SAME_PHRASES = {
    "nosolution": "\\emptyset", "nosolutions": "\\emptyset", "norealsolution": "\\emptyset", "norealsolutions": "\\emptyset",
    "emptyset": "\\emptyset", "allrealnumbers": "\\mathbb{R}", "allreals": "\\mathbb{R}", "allrealnumber": "\\mathbb{R}",
}  # fmt: skip
