"""A small grammar of English-like stories, for training and measuring the demo model.

A story is a few *threads* woven together. Each thread is an ordered list of
sentences about the same cast in which later sentences follow from earlier ones
(what was hidden is found, what was counted is added up), and weaving puts
sentences of other threads in between. So a good model of the text must carry
facts over a distance, as well as know the vocabulary, its agreement and the
fixed facts of this little world.
"""

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


GIRLS = words("Mia Anna Lily Rosa Emma Nina Clara Sofia Ruth Vera Zoe Ella Hana Iris Dora Julia")
BOYS = words("Tom Ben Max Leo Sam Oscar Felix Hugo Paul Adam Noah Omar Ivan Jack Karl Peter")
COLOURS = words("red blue green yellow white black brown pink silver purple grey golden")
TOYS = words(
    "ball doll kite drum puzzle robot train boat car whistle mask crown ring book pencil brush "
    "key coin shell button ribbon scarf hat glove candle lamp clock cup spoon bell"
)
CONTAINERS = [
    "in the box", "in the basket", "in the drawer", "in the bag", "in the cupboard", "in the jar",
    "in the chest", "in the bucket", "on the shelf", "on the table", "on the roof",
    "under the bed", "under the chair", "under the carpet", "behind the door",
    "behind the curtain", "behind the sofa", "behind the stove",
]  # fmt: skip
PLACES = words(
    "park school market library beach forest river garden bakery station museum harbour castle "
    "bridge church theatre lake mountain village meadow"
)
COUNTED = words(
    "apples pears plums cherries lemons peaches stones stamps marbles cards flowers feathers "
    "nuts eggs cookies cakes sweets carrots onions leaves"
)
GROCERIES = words(
    "bread milk honey butter cheese rice sugar salt flour tea coffee soup jam pasta fish meat cream corn pepper juice"
)
NUMBERS = words("no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# Fixed facts: the model has to store these in its weights, no context gives them away.
ANIMALS = {
    "cow": "grass moo barn", "cat": "tuna meow cushion", "dog": "bones woof kennel",
    "horse": "hay neigh stable", "pig": "acorns oink sty", "hen": "seeds cluck coop",
    "duck": "weeds quack pond", "bee": "nectar buzz hive", "lion": "deer roar den",
    "owl": "mice hoot oak", "frog": "flies croak swamp", "bear": "berries growl cave",
    "snake": "rats hiss hole", "mouse": "crumbs squeak nest", "sheep": "clover baa fold",
    "wolf": "rabbits howl woods",
}  # fmt: skip
JOBS = {
    "baker": "oven bakes loaves", "doctor": "needle heals patients", "farmer": "plough grows wheat",
    "tailor": "thread sews coats", "painter": "easel paints portraits",
    "teacher": "chalk teaches children", "carpenter": "hammer builds houses",
    "fisherman": "net catches salmon", "writer": "pen writes novels", "cook": "pan fries potatoes",
    "miner": "lantern digs coal", "gardener": "spade plants roses", "smith": "anvil makes swords",
    "barber": "scissors cuts hair", "pilot": "map flies planes", "sailor": "compass steers ships",
}  # fmt: skip
WEATHER = {
    "rainy": ("raincoat", "wet"), "snowy": ("coat", "cold"), "sunny": ("sunhat", "hot"),
    "windy": ("jacket", "chilly"), "foggy": ("torch", "lost"), "stormy": ("helmet", "scared"),
}  # fmt: skip
CAUSES = [
    ("stayed up until midnight", "could not wake up in the morning"),
    ("forgot to eat breakfast", "felt hungry before noon"),
    ("ran all the way up the hill", "had to stop to catch {his} breath"),
    ("spilled ink over the letter", "had to write it again"),
    ("left the window open", "heard the birds singing all night"),
    ("lost {his} only ticket", "could not get into the show"),
    ("studied hard for the test", "answered every question"),
    ("tripped over a root", "hurt {his} left knee"),
    ("won first prize in the race", "smiled from ear to ear"),
    ("broke the tall mirror", "swept the glass from the floor"),
    ("missed the last bus", "walked home in the dark"),
    ("told a terrible lie", "said sorry to everyone"),
    ("planted a tiny seed", "watered it every single day"),
    ("saw a strange ghost", "screamed and hid"),
    ("drank too much lemonade", "had a stomach ache"),
    ("practised the violin for months", "played without a mistake"),
]  # fmt: skip
QUALITIES = [
    ("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("stronger", "strongest"),
    ("braver", "bravest"), ("richer", "richest"), ("smarter", "smartest"), ("kinder", "kindest"),
]  # fmt: skip
MOODS = words("happy sad angry proud tired bored lonely curious nervous cheerful")
NOUNS = words("king soldier flower tree house picture window bird cloud wheel student dancer")
STATES = words("old beautiful broken famous silent heavy bright dirty empty gentle")

VERDICTS = words("loved liked hated tried refused wanted")
SYLLABLES = words("ka lo mi tu ra se no bi du fa gi ho ju ke la mo ni pu ro si ta vu wi za")

Slots = dict[str, str]


class Person(NamedTuple):
    """A character: a name with its pronouns."""

    name: str
    he: str
    his: str
    him: str


class Story:
    """The random source and the cast that the threads of one story share."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        people = [Person(name, "she", "her", "her") for name in GIRLS]
        people += [Person(name, "he", "his", "him") for name in BOYS]
        self.cast = rng.sample(people, 3)
        self.colours = iter(rng.sample(COLOURS, 8))
        self.toys = iter(rng.sample(TOYS, 8))

    def pick(self, options: list[str]) -> str:
        """Pick one of several words."""
        return self.rng.choice(options)

    def item(self) -> str:
        """A coloured toy, never the same colour or toy twice in a story."""
        return f"{next(self.colours)} {next(self.toys)}"

    def roles(self) -> Slots:
        """Deal the cast to the slots A, B and C; the pronouns are those of A."""
        first, second, third = self.rng.sample(self.cast, 3)
        names = {"A": first.name, "B": second.name, "C": third.name}
        return names | {"he": first.he, "his": first.his, "him": first.him}

    def tell(self, slots: Slots, *templates: str) -> list[str]:
        """Fill the slots of each sentence and choose among its `[one|other]` wordings."""
        return [self._choose(template).format(**slots) for template in templates]

    def _choose(self, template: str) -> str:
        """Replace each `[one|other]` by one of its alternatives."""
        return re.sub(r"\[(.*?)\]", lambda match: self.pick(match[1].split("|")), template)


def hidden(story: Story) -> list[str]:
    """Something is put away, perhaps moved, and looked for where it was last put."""
    here, there = story.rng.sample(CONTAINERS, 2)
    slots = story.roles() | {"item": story.item(), "here": here, "there": there}
    put = "{A} [put|hid|left] the {item} {here}."
    if story.rng.random() < 0.5:
        return story.tell(slots, put, "[Later|After a while|At night] {A} looked {here} and found the {item}.")
    return story.tell(
        slots,
        put,
        "When {A} was away, {B} took the {item} and put it {there}.",
        "{A} looked {here}, but the {item} was not there. {B} told {him} that it was {there}.",
    )


def counted(story: Story) -> list[str]:
    """Numbers that must be added up or subtracted."""
    have, change = story.rng.randint(3, 9), story.rng.randint(1, 5)
    gain = have < change + 2 or story.rng.random() < 0.5  # "one apples" would not agree
    total = have + change if gain else have - change
    slots = story.roles() | {"things": story.pick(COUNTED)}
    slots |= {"have": NUMBERS[have], "change": NUMBERS[change], "total": NUMBERS[total]}
    change_told = "{B} gave {A} {change} more" if gain else "{A} gave {change} of them to {B}"
    return story.tell(
        slots,
        "{A} had {have} {things}.",
        change_told + ", so now {A} had {total} {things}.",
        '"How many {things} do you have?" asked {C}. "I have {total}," said {A}.',
    )


def given(story: Story) -> list[str]:
    """A present passes from hand to hand."""
    slots = story.roles() | {"item": story.item()}
    last = ["{B} thanked {A} for the {item}.", "Then {B} gave the {item} to {C}. {C} kept it."]
    return story.tell(slots, "{A} [bought|made] a {item} for {B}.", story.pick(last))


def travelled(story: Story) -> list[str]:
    """A way there and the same way back."""
    start, goal = story.rng.sample(PLACES, 2)
    slots = story.roles() | {"start": start, "goal": goal, "companion": story.pick(["B", "C"])}
    slots["with"] = slots[slots["companion"]]
    return story.tell(
        slots,
        "{A} [walked|went|ran] from the {start} to the {goal} with {with}.",
        "[At last|Before dark] {A} and {with} left the {goal} and came back to the {start}.",
    )


def shopped(story: Story) -> list[str]:
    """A list that is repeated in order."""
    one, two, three = story.rng.sample(GROCERIES, 3)
    slots = story.roles() | {"one": one, "two": two, "three": three, "day": story.pick(DAYS)}
    return story.tell(
        slots,
        "On {day} {A} [needed|wanted] some {one}, some {two} and some {three}.",
        "At the shop {A} bought the {one}, the {two} and the {three}.",
    )


def scheduled(story: Story) -> list[str]:
    """The days of the week in their order."""
    day = story.rng.randrange(7)
    slots = story.roles() | {"today": DAYS[day], "next": DAYS[(day + 1) % 7]}
    slots |= {"place": story.pick(PLACES), "other": story.pick(PLACES)}
    return story.tell(
        slots,
        "It was {today}. {A} said that {he} would go to the {place} tomorrow.",
        "On {next} {A} went to the {place}, as {he} had said.",
    )


def fed(story: Story) -> list[str]:
    """What an animal eats, says and lives in."""
    animal = story.pick(list(ANIMALS))
    food, sound, home = ANIMALS[animal].split()
    slots = story.roles() | {"animal": animal, "food": food, "sound": sound, "home": home}
    return story.tell(
        slots,
        "{A} [met|saw] a [beautiful|famous|gentle] {animal}.",
        "The {animal} was hungry, so {A} gave it some {food}.",
        'The {animal} said "{sound}" and went back to its {home}.',
    )


def worked(story: Story) -> list[str]:
    """What somebody of a trade uses and does, in the present tense, one and many."""
    job = story.pick(list(JOBS))
    tool, verb, product = JOBS[job].split()
    slots = story.roles() | {"job": job, "tool": tool, "verb": verb, "product": product}
    return story.tell(
        slots,
        "{A} wanted to be a {job}.",
        '"A {job} {verb} {product}," said {B}.',
        "So {C} gave {A} a {tool}, because every {job} needs one.",
    )


def weathered(story: Story) -> list[str]:
    """What one takes along in which weather, and what happens without it."""
    weather = story.pick(list(WEATHER))
    thing, feeling = WEATHER[weather]
    slots = story.roles() | {"weather": weather, "thing": thing, "feeling": feeling}
    return story.tell(
        slots,
        "It was a {weather} [day|morning].",
        "{A} [forgot|did not take] the {thing}, so {he} got {feeling}.",
        "But {B} had a {thing} and did not get {feeling}.",
    )


def caused(story: Story) -> list[str]:
    """A cause, and its effect."""
    cause, effect = story.rng.choice(CAUSES)
    slots = story.roles()
    return story.tell(slots, f"{{A}} {cause}.", f"[That is why|Because of that] {{A}} {effect}.")


def compared(story: Story) -> list[str]:
    """An order of three, from two comparisons."""
    more, most = story.rng.choice(QUALITIES)
    slots = story.roles() | {"more": more, "most": most}
    facts = ["{A} was {more} than {B}.", "{B} was {more} than {C}."]
    story.rng.shuffle(facts)
    return story.tell(slots, " ".join(facts), "So {A} was the {most} of the three.")


def described(story: Story) -> list[str]:
    """Number agreement across a distracting noun."""
    subject, other = story.rng.sample(NOUNS, 2)
    many, others = story.pick(["", "s"]), story.pick(["", "s"])
    slots = story.roles() | {"subject": subject + many, "other": other + others}
    slots |= {"was": "were" if many else "was", "it": "they" if many else "it"}
    slots |= {"state": story.pick(STATES)}
    return story.tell(
        slots,
        "The {subject} near the {other} {was} {state}.",
        "{A} asked about the {subject}. {B} said that {it} {was} {state}.",
    )


def felt(story: Story) -> list[str]:
    """A mood that lasts until somebody changes it."""
    mood, later = story.rng.sample(MOODS, 2)
    slots = story.roles() | {"mood": mood, "later": later}
    return story.tell(
        slots,
        "{A} was {mood} [today|that day].",
        '"Why are you so {mood}?" asked {B}.',
        "In the end {A} was not {mood} any more, but {later}.",
    )


def fact(question: str, answers: list[str]) -> str:
    """The one answer that this world gives to a question, the same in every story."""
    return random.Random(question).choice(answers)


def foreign(word: str) -> str:
    """The word of an invented language for an English word."""
    return "".join(fact(f"{word} {part}", SYLLABLES) for part in range(2))


def distance(start: str, goal: str) -> str:
    """The miles between two places, the same both ways."""
    return fact(" ".join(sorted([start, goal])), NUMBERS[2:])


def settled(story: Story) -> list[str]:
    """Where everybody is on which day of the week."""
    day = story.pick(DAYS)
    slots = story.roles() | {"day": day}
    slots |= {f"place{role}": fact(f"{slots[role]} {day}", PLACES) for role in "ABC"}
    return story.tell(
        slots,
        "Every {day} {A} went to the {placeA} and {B} went to the {placeB}.",
        "{C} was at the {placeC} every {day}.",
    )


def tasted(story: Story) -> list[str]:
    """Who likes which food."""
    food = story.pick(GROCERIES)
    slots = story.roles() | {"food": food}
    slots |= {f"verb{role}": fact(f"{slots[role]} {food}", VERDICTS) for role in "ABC"}
    return story.tell(
        slots,
        "There was {food} for dinner. {A} {verbA} {food}.",
        "{B} {verbB} {food}, and {C} {verbC} {food}.",
    )


def translated(story: Story) -> list[str]:
    """A dictionary of an invented language, word for word."""
    colour, thing = story.pick(COLOURS), story.pick(TOYS + COUNTED)
    slots = story.roles() | {"english": f"{colour} {thing}"}
    slots |= {"foreign": f"{foreign(colour)} {foreign(thing)}"}
    return story.tell(
        slots,
        "{A} learned a new language.",
        '"What is {english} in that language?" asked {B}. "It is {foreign}," said {A}.',
    )


def measured(story: Story) -> list[str]:
    """How far the places are from each other."""
    start, near, far = story.rng.sample(PLACES, 3)
    slots = story.roles() | {"start": start, "near": near, "far": far}
    slots |= {"one": distance(start, near), "two": distance(start, far)}
    return story.tell(
        slots,
        "{A} rode from the {start} to the {near}, which is {one} miles.",
        "From the {start} to the {far} it is {two} miles, {B} said.",
    )


def priced(story: Story) -> list[str]:
    """What the things in the shop cost."""
    one, two = story.rng.sample(TOYS, 2)
    slots = story.roles() | {"one": one, "two": two}
    slots |= {"cost": fact(one, NUMBERS[2:]), "price": fact(two, NUMBERS[2:])}
    return story.tell(
        slots,
        "{A} paid {cost} coins for a {one}.",
        "{B} sold a {two} for {price} coins.",
    )


THREADS: list[Callable[[Story], list[str]]] = [
    hidden, counted, given, travelled, shopped, scheduled, fed, worked, weathered, caused,
    compared, described, felt, settled, tasted, translated, measured, priced,
]  # fmt: skip


def weave(rng: random.Random, threads: list[list[str]]) -> Iterator[str]:
    """Interleave the threads at random, each kept in its own order."""
    turns = [index for index, thread in enumerate(threads) for _ in thread]
    rng.shuffle(turns)
    sentences = [iter(thread) for thread in threads]
    return (next(sentences[turn]) for turn in turns)


def write_story(rng: random.Random) -> str:
    """One story: an opening that names the cast, then three to five woven threads."""
    story = Story(rng)
    one, two, three = (person.name for person in story.cast)
    threads = [thread(story) for thread in rng.sample(THREADS, rng.randint(3, 5))]
    return " ".join([f"This is a story about {one}, {two} and {three}.", *weave(rng, threads)])


def stories(seed: int) -> Iterator[str]:
    """An endless stream of stories."""
    rng = random.Random(seed)
    while True:
        yield write_story(rng)
