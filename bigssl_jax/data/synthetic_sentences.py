"""Made-up English sentences: thousands of different ones from a small grammar of our own.

A template is a text with slots; a slot is filled from the list of its name, and what is filled in
may have slots again. Scenes give neighbouring sentences common people and places, as in real texts:

    "{who} {did} {thing} {somewhere}."  ->  "My sister carried the wooden box to the harbour."

The generator is `random.Random.random`, whose numbers Python promises never to change, so that
sentence i of seed s is the same everywhere. Numbers are written as words: what stands is said.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

# One line per list; entries are divided by '|'.
GRAMMAR_TEXT = """
sentence: {who} {did} {thing} {somewhere}.|{when} {who} {did} {thing}.|{who} {felt} because {reason}.|{thing} {stood} {place}.|{place}, {thing} {stood}.|did you {do} {thing} {when}?|would {who} like to {do} {thing} {somewhere}?|please {do} {thing} before {event}.|if {reason}, we will {do} {thing}.|{who} said that {reason}.|{when} there were {number} {things} {place}.|nobody {place} knew why {who} {did} {thing}.|i think {reason}, but {who} {felt}.|{number} {things} are {quality} enough for {people}.|{who} {went} {somewhere} and {did} {thing}.|why is {thing} so {quality}?|after {event}, {people} {went} {somewhere}.|it is {quality} to {do} {thing} {when}.|let us {do} {thing} and then {do} {thing}.|{people} never {do} {things} {place}.|{greeting}, {name}, {question}|the {colour} {object} belongs to {who}.|{who} will come back {future} with {number} {things}.|he asked {who} to {do} {thing}.|she can hear {thing} {place}.
who: {name}|{name}|my {relative}|the {job}|the {age} {job}|our {relative}|{name} and {name}|a {quality} {job}|the {job} from {town}
people: the {job}s|the children|our neighbours|all of us|most people|the {age} men|the visitors|many travellers|my friends
thing: the {object}|a {material} {object}|the {colour} {object}|the {material} {object}|that {quality} {object}|my {relative}'s {object}|the {job}'s {object}|every {object}|the {things}|another {object}
things: {object}s|{colour} {object}s|{material} {object}s|{quality} {object}s
somewhere: to the {site}|from {town} to {town}|towards the {site}|across the {site}|away from the {site}|out of the {site}|back to {town}
place: in the {site}|near the {site}|behind the {site}|beside the {quality} {site}|on the way to {town}|under the {site}|not far from {town}|in {town}
when: yesterday|last {day}|every {day}|in the {part}|at {hour} o'clock|{number} days ago|in {month}|on {day} {part}|just before {event}
future: tomorrow|next {day}|in {number} weeks|after {event}|on {day}|before {month}
event: breakfast|the storm|dinner|the concert|the long winter|sunrise|the meeting|the first snow|the wedding|the harvest|supper|the election|midnight|the lesson|the race
reason: the {object} was too {quality}|it {weather}|the {job} had lost the {object}|the {site} was {quality}|{name} forgot the {object}|we had only {number} {things}|the {things} were {quality}|there was no {object} left|the {job} spoke too fast|nobody wanted to {do} {thing}
felt: was {mood}|felt {mood}|looked rather {mood}|seemed {mood}|became {mood}|was never {mood}|stayed {mood}
stood: stood still|was waiting|lay forgotten|was for sale|fell apart|began to shake|shone brightly|could not be found|was left alone|was made by {who}
did: carried|found|painted|repaired|sold|borrowed|dropped|washed|admired|bought|hid|described|measured|pushed|opened|lifted|followed|kept|stole|drew|noticed|counted|brought|wrapped|covered|returned|weighed|wanted|chose|cleaned
do: carry|find|paint|repair|sell|borrow|drop|wash|admire|buy|hide|describe|measure|push|open|lift|follow|keep|steal|draw|notice|count|bring|wrap|cover|return|weigh|want|choose|clean
went: walked|drove|hurried|sailed|rode|wandered|marched|travelled|ran|crawled|cycled|climbed
weather: rained all day|was snowing|was getting dark|was warm and dry|froze during the night|had been foggy|thundered above us|was terribly hot|blew from the north
greeting: good morning|hello|excuse me|good evening|listen|thank you|wait a moment|welcome home|well
question: where did you {do} {thing}?|have you seen the {object}?|when does the {site} open?|may i {do} {thing}?|how many {things} do we need?|who {did} {thing}?|what is wrong with the {object}?|is the {object} still {quality}?
name: Anna|George|Maria|Peter|Alice|Thomas|Julia|Henry|Laura|Martin|Sophie|Daniel|Emma|Victor|Clara|Oliver|Nora|Simon|Helen|Jack|Ruth|Arthur|Grace|Philip|Irene|Walter|Judith|Edward|Beatrice|Hugo
relative: mother|father|sister|brother|uncle|aunt|cousin|grandmother|grandfather|daughter|son|nephew|niece
job: baker|teacher|farmer|nurse|driver|gardener|painter|captain|doctor|miller|carpenter|student|singer|lawyer|sailor|engineer|tailor|butcher|librarian|pilot|shepherd|plumber|judge|barber|clerk|dentist|fisher|guard|hunter|potter
age: old|young|oldest|youngest|retired
object: box|ladder|basket|letter|kettle|bicycle|lantern|mirror|picture|table|blanket|hammer|violin|bottle|carpet|clock|wheel|engine|camera|coat|bucket|candle|chair|cushion|drum|envelope|feather|garden chair|helmet|jacket|key|lamp|map|needle|oven|pencil|piano|pillow|plate|pot|purse|radio|ring|rope|saddle|sail|scarf|shovel|spoon|suitcase|sword|telescope|tent|ticket|towel|trumpet|umbrella|vase|wallet|whistle|window|wagon|zip
material: wooden|silver|golden|paper|woollen|plastic|copper|leather|glass|velvet|iron|cotton|marble|rubber|clay
colour: red|green|yellow|blue|purple|white|black|orange|brown|grey|pink
quality: heavy|beautiful|useful|strange|expensive|broken|quiet|dusty|narrow|famous|simple|dangerous|gentle|bright|rough|modern|ancient|crooked|perfect|clumsy|cheerful|rusty|smooth|huge|tiny|fresh|clever|noisy|thick|hollow|muddy|precious
mood: happy|tired|angry|surprised|hungry|nervous|proud|lonely|thirsty|calm|curious|worried|grateful|bored|sleepy|brave|jealous|shy|cheerful|silent
site: kitchen|harbour|market|railway station|garden|bridge|library|hospital|mountain|river|school|workshop|forest|church|castle|factory|beach|theatre|farm|office|cellar|museum|valley|island|lighthouse|field|airport|bakery|square|tower|village|windmill|canal|desert|tunnel
town: London|Oxford|Vienna|Boston|Lisbon|Dublin|Sydney|Geneva|Denver|Leeds|Venice|Oslo|Madrid|Chicago|Bristol|Toronto|Athens|York
day: monday|tuesday|wednesday|thursday|friday|saturday|sunday
month: january|february|march|april|may|june|july|august|september|october|november|december
part: morning|afternoon|evening|night
hour: one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve
number: two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fifteen|twenty|thirty|forty five|sixty|eighty|a hundred|two hundred|a thousand
"""  # noqa: E501
GRAMMAR = {
    name.strip(): choices.strip().split('|')
    for name, _, choices in (line.partition(':') for line in GRAMMAR_TEXT.strip().splitlines())
}
SLOT = re.compile(r'\{(\w+)\}')
PLURALS = (('boxs', 'boxes'), ('torchs', 'torches'), ('childs', 'children'), (' a o', ' an o'),
           (' a e', ' an e'), (' a a', ' an a'), (' a i', ' an i'), (' a u', ' an u'),
          (' an use', ' a use'))  # fmt: skip
SCENE_SENTENCES = 8
SCENE_NAMES = 3  # how many choices of a scene's own lists remain
SCENE_LISTS = ('name', 'site', 'town', 'job')


def sentences(seed: int, count: int) -> Iterator[tuple[int, str]]:
    """Yields `count` pairs (scene, sentence), all sentences different from each other.

    Scenes have SCENE_SENTENCES sentences and share a few names, places and professions. Sentence i
    depends on the seed alone, not on `count`.
    """
    generator = random.Random(seed)
    known: set[str] = set()
    for index in range(count):
        if index % SCENE_SENTENCES == 0:
            own = {name: _some(generator, GRAMMAR[name]) for name in SCENE_LISTS}
            grammar = {**GRAMMAR, **own}
        sentence = _sentence(generator, grammar)
        while sentence in known:
            sentence = _sentence(generator, grammar)
        known.add(sentence)
        yield index // SCENE_SENTENCES, sentence


def _pick(generator: random.Random, choices: list[str]) -> str:
    return choices[int(generator.random() * len(choices))]


def _some(generator: random.Random, choices: list[str]) -> list[str]:
    return [_pick(generator, choices) for _ in range(SCENE_NAMES)]


def _sentence(generator: random.Random, grammar: dict[str, list[str]]) -> str:
    text = '{sentence}'
    while slot := SLOT.search(text):
        text = text[: slot.start()] + _pick(generator, grammar[slot[1]]) + text[slot.end() :]
    text = f' {text}'
    for wrong, right in PLURALS:
        text = text.replace(wrong, right)
    text = text.strip().replace(' i ', ' I ')
    return text[0].upper() + text[1:]
