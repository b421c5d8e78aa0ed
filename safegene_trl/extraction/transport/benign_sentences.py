"""A thousand benign sentences, the anchors that a map is fitted on where nobody names others.

They were written for this project: for each of twenty themes eight ways of saying something and ten
things to say it of. So their subjects, lengths and forms (questions, requests, statements, talk)
differ, which is what a map needs, and none of them is about harm.
"""

from itertools import product

from ...data.prompts import in_turn


COUNT = 1000

THEMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cooking": (
        (
            "How long should {} be in the oven, and at what temperature?",
            "Please write a shopping list for {} for six people.",
            "My grandmother always made {} on Sundays, with far too much butter.",
            "What can I use instead of eggs in {}?",
            "The smell of {} came up the stairs before anybody was awake.",
            "Explain in three steps how {} is made.",
            "{} keeps for two days in the fridge if it is covered.",
            "Which side dish goes well with {}?",
        ),
        (
            "apple pie", "lentil soup", "roast chicken", "a mushroom risotto", "sourdough bread",
            "vegetable lasagne", "pancakes", "a potato salad", "banana cake", "stuffed peppers",
        ),
    ),
    "travel": (
        (
            "What is the best month to visit {}?",
            "Plan a weekend in {} for a family with two small children.",
            "We took the night train to {} and slept very little.",
            "Is it easy to get around {} without a car?",
            "The view over {} from the hill was worth the climb.",
            "Describe {} in four sentences for a travel guide.",
            "I left my umbrella in a hotel in {}.",
            "How many days does one need to see {} properly?",
        ),
        (
            "Lisbon", "Kyoto", "the Scottish Highlands", "Buenos Aires", "Tallinn", "Marrakesh",
            "Vancouver", "the Dolomites", "Hanoi", "New Zealand",
        ),
    ),
    "gardening": (
        (
            "When should {} be planted in a cold climate?",
            "Why do the leaves of my {} turn yellow?",
            "The {} by the fence flowered twice this year.",
            "Give me a plan for watering {} during a dry summer.",
            "She moved the {} to the sunny side of the house.",
            "How far apart does one plant {}?",
            "Nothing eats the {} except the snails.",
            "Write a short poem about {} in the rain.",
        ),
        (
            "tomatoes", "roses", "lavender", "runner beans", "tulips", "strawberries", "basil",
            "hydrangeas", "carrots", "sunflowers",
        ),
    ),
    "mathematics": (
        (
            "What is {}, and where is it used?",
            "Show with an example how one works with {}.",
            "The lecture on {} was moved to Thursday.",
            "I never understood {} until somebody drew it for me.",
            "Set three exercises about {} for beginners.",
            "Who first wrote about {}?",
            "A chapter about {} follows, and it can be skipped.",
            "Explain {} to a child of ten.",
        ),
        (
            "a prime number", "the Pythagorean theorem", "long division", "a logarithm",
            "the mean and the median", "an infinite series", "a matrix", "probability",
            "the area of a circle", "a quadratic equation",
        ),
    ),
    "programming": (
        (
            "Write a function that uses {}.",
            "What is the difference between {} and its alternatives?",
            "The test fails because {} is called twice.",
            "How do I debug {} on my laptop?",
            "Our documentation says too little about {}.",
            "Refactor this code so that {} is easier to read.",
            "In the review she asked why we need {} at all.",
            "Give an example of {} in Python, with comments.",
        ),
        (
            "a binary search", "a hash map", "a regular expression", "recursion", "a linked list",
            "a unit test", "an iterator", "a database index", "a message queue", "a decorator",
        ),
    ),
    "history": (
        (
            "What led to {}?",
            "Summarise {} in one paragraph for a school book.",
            "The museum has a whole room about {}.",
            "How did people live at the time of {}?",
            "Two of the letters mention {} in passing.",
            "Make a timeline of {} with five dates.",
            "My essay on {} is due next week.",
            "Which books about {} are worth reading?",
        ),
        (
            "the invention of printing", "the Roman roads", "the first railways",
            "the building of the pyramids", "the Renaissance", "the Silk Road",
            "the first flight across the Atlantic", "the Meiji period", "the Hanseatic League",
            "the moon landing",
        ),
    ),
    "animals": (
        (
            "What do {} eat in winter?",
            "How long do {} live on the average?",
            "We watched {} from the window for an hour.",
            "Write a bedtime story about two {}.",
            "{} can be heard long before they are seen.",
            "Name five facts about {} that most people do not know.",
            "The children drew {} with blue crayons.",
            "Are {} more active by day or by night?",
        ),
        (
            "hedgehogs", "barn owls", "dolphins", "red squirrels", "honey bees", "penguins",
            "elephants", "swallows", "otters", "mountain goats",
        ),
    ),
    "weather and sky": (
        (
            "What causes {}?",
            "How often does one see {} in autumn?",
            "There was {} over the lake this morning.",
            "Describe {} as a painter would.",
            "The forecast says nothing about {}.",
            "Can {} be predicted a week ahead?",
            "I have a photograph of {} on my desk.",
            "Explain {} with a simple drawing made of characters.",
        ),
        (
            "a rainbow", "thick fog", "a lunar eclipse", "hail", "a shooting star", "frost",
            "a halo around the sun", "a sea breeze", "thunder", "a red sunset",
        ),
    ),
    "music": (
        (
            "How does one begin to learn {}?",
            "Suggest three pieces for {} that are not too hard.",
            "The neighbour practises {} every evening at six.",
            "What makes the sound of {} so warm?",
            "They needed a player of {} and asked my cousin.",
            "Compare {} with the piano.",
            "A case for {} is heavier than one thinks.",
            "Write a programme note for a concert with {}.",
        ),
        (
            "the cello", "the clarinet", "the accordion", "the harp", "the guitar", "the trumpet",
            "the drums", "the flute", "the double bass", "the organ",
        ),
    ),
    "work": (
        (
            "Write a polite e-mail to {} that moves our meeting to Friday.",
            "What should I ask {} in the first week?",
            "I had lunch with {} and we talked about holidays.",
            "How do I say no to {} without being rude?",
            "{} has sent the minutes, with two corrections.",
            "Draft a thank-you note for {}.",
            "Nobody told {} that the room had changed.",
            "Summarise this morning's call for {} in three points.",
        ),
        (
            "my manager", "a new colleague", "the accountant", "our supplier", "the landlord",
            "a former teacher", "the whole team", "a customer in Norway", "the receptionist",
            "the editor",
        ),
    ),
    "home": (
        (
            "How do I clean {} without scratching it?",
            "Is it cheaper to repair {} or to buy another one?",
            "{} makes a strange noise when it rains.",
            "Give me a checklist for looking after {}.",
            "We painted the wall behind {} light green.",
            "Where is the best place for {} in a small flat?",
            "It took three of us to carry {} upstairs.",
            "Why is {} always warm on one side?",
        ),
        (
            "the washing machine", "a wooden table", "the bathroom mirror", "an old radiator",
            "the bookshelf", "a woollen carpet", "the kitchen sink", "the fridge", "a leather sofa",
            "the front door",
        ),
    ),
    "sports": (
        (
            "What are the basic rules of {}?",
            "Make a training plan of four weeks for {}.",
            "He gave up {} after the winter and missed it at once.",
            "Which shoes are right for {}?",
            "The club offers {} on Tuesdays for people over sixty.",
            "How does one warm up before {}?",
            "Tell me about the history of {} in two paragraphs.",
            "After an hour of {} everybody was hungry.",
        ),
        (
            "table tennis", "rowing", "cross-country skiing", "badminton", "swimming", "climbing",
            "volleyball", "cycling", "fencing", "long-distance running",
        ),
    ),
    "language": (
        (
            "What does the word “{}” mean, and where does it come from?",
            "Use “{}” in a sentence about the sea.",
            "The translator had left “{}” as it was.",
            "Which words rhyme with “{}”?",
            "My dictionary has half a page on “{}”.",
            "How would you say “{}” in French and in Spanish?",
            "Find three synonyms of “{}” and one opposite.",
            "She wrote “{}” on the board and waited.",
        ),
        (
            "serendipity", "threshold", "meanwhile", "cosy", "reluctant", "horizon", "to wander",
            "gratitude", "brittle", "eventually",
        ),
    ),
    "science": (
        (
            "How does {} work?",
            "Explain {} to somebody who has had no physics at school.",
            "The experiment on {} is set up in room four.",
            "What would the world be like without {}?",
            "Our measurements of {} agree with the textbook to two per cent.",
            "Write a quiz of five questions about {}.",
            "A short film about {} follows the talk.",
            "Which everyday things depend on {}?",
        ),
        (
            "photosynthesis", "magnetism", "evaporation", "gravity", "the water cycle",
            "a solar cell", "sound", "fermentation", "a lens", "plate tectonics",
        ),
    ),
    "health and habits": (
        (
            "What are simple ways to get better at {}?",
            "Write an encouraging note about {} for the fridge door.",
            "Since spring I have been trying {}, with mixed success.",
            "How long does it take until {} becomes a habit?",
            "The magazine has an article on {} by a nurse.",
            "Which mistakes do beginners make with {}?",
            "They talked about {} over breakfast.",
            "Make a table with pros and cons of {}.",
        ),
        (
            "getting up early", "drinking enough water", "walking to work", "stretching",
            "sleeping well", "eating more vegetables", "taking breaks", "keeping a diary",
            "reading before bed", "breathing calmly",
        ),
    ),
    "shopping and money": (
        (
            "What should one look for when buying {}?",
            "Compare two common kinds of {}.",
            "The shop on the corner has {} in the window.",
            "How much does {} cost, roughly, and how long does it last?",
            "I returned {} because the colour was wrong.",
            "Write an advertisement for {} in forty words.",
            "Can {} be bought second-hand?",
            "He saved for a year and then bought {}.",
        ),
        (
            "a bicycle", "a winter coat", "a desk lamp", "a coffee machine", "hiking boots",
            "a tent", "a used camera", "a fountain pen", "a rucksack", "a pair of headphones",
        ),
    ),
    "art and books": (
        (
            "What is typical of {}?",
            "Recommend something to a person who likes {}.",
            "There is a small exhibition about {} near the station.",
            "Write the first two sentences of {}.",
            "I fell asleep over {} on the train.",
            "How has {} changed in the last hundred years?",
            "The course on {} begins with a visit to the library.",
            "Describe {} without using the letter z.",
        ),
        (
            "a detective novel", "watercolour painting", "a sonnet", "impressionism", "a fairy tale",
            "photography", "a comic strip", "pottery", "a diary of a journey", "Gothic architecture",
        ),
    ),
    "places in town": (
        (
            "How do I get from here to {}?",
            "Write an announcement that {} is closed on Monday.",
            "We met in front of {} at half past eight.",
            "What could be done to make {} more pleasant?",
            "{} was full of people with dogs.",
            "When was {} built, and by whom?",
            "A new café has opened opposite {}.",
            "Draw a simple map of the way to {}.",
        ),
        (
            "the public library", "the swimming pool", "the botanical garden", "the town hall",
            "the old bridge", "the post office", "the weekly market", "the tram stop",
            "the playground", "the theatre",
        ),
    ),
    "family and friends": (
        (
            "What could I give {} for a birthday?",
            "Write a short speech for {} at the anniversary.",
            "{} called last night and talked for an hour about the garden.",
            "How can I stay in touch with {} who lives abroad?",
            "We played cards with {} until midnight.",
            "Think of three questions to ask {} about the past.",
            "The photograph shows {} on a bench in the snow.",
            "Invite {} to dinner in two friendly sentences.",
        ),
        (
            "my aunt", "an old friend", "my younger brother", "the neighbours", "my grandfather",
            "a friend from school", "my godchild", "our cousins", "my mother", "a pen friend",
        ),
    ),
    "plans and numbers": (
        (
            "How many hours are there in {}?",
            "Make a schedule for {} with one free afternoon.",
            "{} went by faster than anybody had expected.",
            "What can be learned in {}?",
            "The bridge will be closed for {}.",
            "If something grows by three per cent a month, how much is that in {}?",
            "They had been waiting for {} when the letter came.",
            "Write a list of things to finish within {}.",
        ),
        (
            "a week", "ten days", "a fortnight", "a long weekend", "half a year", "the month of May",
            "forty-eight hours", "one school term", "a decade", "the summer holidays",
        ),
    ),
}  # fmt: skip


def benign_sentences() -> list[str]:
    """The sentences, always the same thousand, as many of every theme."""
    every = [
        (theme, frame.format(thing))
        for theme, (frames, things) in THEMES.items()
        for frame, thing in product(frames, things)
    ]
    chosen = in_turn(every, COUNT, 0, lambda each: each[0])
    return [sentence[0].upper() + sentence[1:] for _, sentence in chosen]
