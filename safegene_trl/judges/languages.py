"""In which language an answer is: its script by Unicode, then letters and stop words.

Simple and deterministic on purpose. What a judge needs is to tell the languages that it knows from
those that it does not, and of these only that they are others. Libraries like `py3langid` and
`lingua` tell a hundred apart, but always name one of theirs, are unsure of short answers, which
refusals are, and lingua weighs more than this package.

English is what is not shown to be anything else: short answers, names, lists, numbers and code.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence


SAMPLE = 2000  # characters that tell the language
LEAST_LETTERS = 300  # of Russian, in which ы, э or ё must have come
LEAST_WORDS = 20  # of running text, in which stop words must have come
LEAST_STOP_WORDS = 0.03  # share of the words
LEAST_KANA = 0.05  # share of the letters in Japanese; names alone have fewer
LEAST_OTHERS = 2  # different words of other languages; one alone tells only in a sentence
LEAST_SENTENCE = 4  # words
LEAST_RUN = 4  # words between two punctuation marks, on average, in running text

_SCRIPTS = {
    "latin": re.compile(r"[A-Za-zÀ-ɏḀ-ỿ]"),
    "cyrillic": re.compile(r"[Ѐ-ԯ]"),
    "han": re.compile(r"[㐀-䶿一-鿿々]"),
    "kana": re.compile(r"[ぁ-ゖァ-ヺー]"),
    "hangul": re.compile(r"[가-힣ᄀ-ᇿ㄰-㆏]"),
    "arabic": re.compile(r"[ء-ي٠-ٿٮ-ۿ]"),
    "devanagari": re.compile(r"[ऀ-ॿ]"),
}
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_BREAK = re.compile(r"[^\w\s'’]+|\n+|\d+")
_FOREIGN_WORD = re.compile(r"[^\W\d_A-Za-zÀ-ɏ]{2}")  # no symbol of a formula
_NOT_RUSSIAN = re.compile(r"[ЀЂЃЄЅІЇЈЉЊЋЌЍЎЏѐђѓєѕіїјљњћќѝўџҐґ-ԯ]")
_NOT_RUSSIAN_WORD = re.compile(
    r"\b(?:але|що|та|це|цим|можу|який|від|вибачте|його|съжалявам|мога|това|със|този|али|жао|шта"
    r"|није)\b",
    re.IGNORECASE,
)
_RUSSIAN = re.compile(r"[ыэё]", re.IGNORECASE)
_NOT_ARABIC = re.compile(r"[ٱ-ۓە-ۿ]")  # Persian, Urdu and others write ک, ی, ے, پ, چ
_NOT_WESTERN = re.compile(
    r"[ăąćčďđęěğıłńňőřśşșťțůűźżžơưḀ-ỿ]"
)  # in none of the Latin-script ones below

_HINDI = frozenset(
    [
        "है",
        "हैं",
        "में",
        "का",
        "की",
        "के",
        "को",
        "से",
        "और",
        "नहीं",
        "मैं",
        "कर",
        "पर",
        "यह",
        "हो",
        "एक",
        "आप",
        "आपकी",
        "आपके",
        "मुझे",
        "इस",
        "था",
        "थी",
        "भी",
        "तो",
        "ने",
        "करें",
        "हूँ",
        "हूं",
    ]
)
# Marathi and Nepali
_NOT_HINDI = frozenset(
    [
        "आहे",
        "आहेत",
        "आणि",
        "मी",
        "तुम्ही",
        "करा",
        "नाही",
        "करू",
        "शकत",
        "हे",
        "ते",
        "या",
        "साठी",
        "मला",
        "छ",
        "छन्",
        "र",
        "हुन्छ",
        "गर्न",
        "लाई",
        "मा",
        "म",
        "हो।",
        "तपाईं",
        "सक्दिन",
        "माफ",
    ]
)
# what is shared counts for each
_STOP_WORDS = {
    "en": "the a an of to and in is it you that this for with on are be as at by or not i can"
    " can't cannot do don't if your have from "
    "will was but they we there what which when how one all so no than then them its he she his"
    " her who would could should about into "
    "more some other has had were been also their my me i'm it's won't sorry here help",
    "de": "der die das den dem des ein eine einen einem einer und oder ist sind nicht kein keine"
    " ich du sie wir ihr ihnen mir dir mich "
    "dich sich es er zu zum zur mit von vom für auf aus bei nach über um an im in als auch aber"
    " wenn wie was dass daß so nur noch kann "
    "kannst können muss werden wird werde wurde habe haben hat leider dabei dann man durch bis am"
    " nein ja hier gut bitte",
    "fr": "le la les l' un une des du de et ou est sont ne pas je tu vous nous il elle on ce"
    " cette ces ça à au aux en dans pour par sur "
    "avec que qui mais si plus votre vos ton ta mon ma se sa son être avoir peux peut faire"
    " désolé désolée non oui puis donc comme très "
    "l' d' j' n' qu' c' s' m' t' suis voici refuse",
    "es": "el la los las un una unos unas de del y o es son no yo tú usted me te se lo le al en"
    " por para con que qué pero si sí más su "
    "sus tu mi como esta este esto eso esa está puedo puede hacer siento hay muy cuando sin sobre"
    " ha he ser también así unos voy haré niego",
    "pt": "o a os as um uma de do da dos das no na nos nas e ou é são não eu você te se lhe ao à"
    " em por para com que mas mais seu sua seus "
    "meu minha como este esta isto isso esse essa está posso pode fazer muito quando sem sobre"
    " foi ser também até pelo pela desculpe "
    "desculpa lamento vou consigo recuso",
    "it": "il lo la i gli le un una uno di del della dei delle da dal in nel nella e o è sono non"
    " io tu lei mi ti si ci vi al alla per con "
    "su che ma se più come questo questa quello questi posso può fare molto quando senza anche"
    " suo sua mio dispiace purtroppo ho ha "
    "essere farò c' l' d' un' dell' all' nell' scusa rifiuto",
    "nl": "de het een en of is zijn niet geen ik je jij u we wij hij zij ze mij me hem haar dat"
    " die dit deze te tot met van voor op uit bij "
    "naar over om aan in als ook maar wanneer hoe wat dan nog kan kunt kun moet wordt worden heb"
    " heeft hebt helaas daar er door nee ja "
    "hier graag zal wil mag ga weiger",
}
# Languages of Latin script that no pattern is made for, by words that are in none of those above
_OTHERS = (
    # Polish
    "nie się jest że przez jak dla oraz mogę przykro mi bardzo tego "
    # Turkish
    "ve bir bu için ile değil olarak çok ama ben üzgünüm "
    # Swedish
    "och att det som inte jag är för på av har till dig kan det en ett hjälpa ledsen "
    # Danish, Norwegian
    "ikke jeg og til på af det er som "
    "kan hjelpe hjælpe desværre dessverre beklager å ved lad "
    # Finnish
    "ja ei että ole olen en voi se tämä mutta "
    "minä sitä auttaa valitettavasti ennen tunti kuin niin sen myös tai "
    # Czech, Slovak
    "že jsem není pro ale ako som nie je nemohu "
    "nemôžem prosím každé jste jsou nebo jako před potom ktoré "
    # Romanian
    "să nu și este pe cu că pentru rău pare pot această ajuta "
    # Indonesian, Malay
    "yang dan untuk dengan tidak saya bisa ini "
    "itu adalah dari maaf anda pada ke setiap boleh "
    # Vietnamese
    "không tôi là của và có thể một được lỗi bạn này "
    # Hungarian
    "nem és hogy az egy ez van nincs segíteni sajnálom "
    # Catalan
    "amb els és però puc això aquesta perquè tinc teva seva "
    # Tagalog
    "ng mga ako ay hindi "
    # Swahili
    "kwa ya wa ni katika siwezi samahani hii kama lakini "
    # Afrikaans
    "nie het ek jy vir wat nie sal jou kan "
    # Croatian, Serbian
    "se da za što nije sam ali mogu pomoći žao"
)
# Words of others that English, or one of the languages above, has as well.
_SHARED = frozenset(
    [
        "mi",
        "na",
        "se",
        "sam",
        "an",
        "wa",
        "ya",
        "ni",
        "en",
        "er",
        "for",
        "men",
        "den",
        "ben",
        "sal",
        "ale",
        "ve",
        "dan",
        "nu",
        "dig",
        "pro",
        "ali",
        "pot",
        "ng",
        "af",
        "sen",
        "pe",
        "till",
        "lad",
        "ke",
        "els",
        "ole",
        "cu",
        "tai",
        "til",
        "az",
        "za",
        "pare",
        "ama",
        "hii",
    ]
)


def _languages_of_words() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for language, words in _STOP_WORDS.items():
        for word in set(words.split()):
            found[word] = (*found.get(word, ()), language)
    others = set(_OTHERS.split()) - _SHARED - found.keys()
    return found | dict.fromkeys(others, ("other",))


_LANGUAGES_OF_WORDS: Mapping[str, tuple[str, ...]] = _languages_of_words()
LANGUAGES = (*_STOP_WORDS, "ru", "zh", "ja", "ko", "ar", "hi")


def languages_of(text: str) -> tuple[str, ...]:
    """The language of a text as one of `LANGUAGES`; several where it may be any of these; none
    where it is another.
    """
    sample = unicodedata.normalize("NFC", text[:SAMPLE]).replace("’", "'")
    if sample.isascii():
        return _of_latin(sample)
    counts = {script: len(letters.findall(sample)) for script, letters in _SCRIPTS.items()}
    letters = sum(map(str.isalpha, sample))
    if letters == 0:
        return ("en",)
    # vowel signs of Devanagari are no letters, and stand in its count all the same
    if letters - sum(counts.values()) > letters / 2:
        return () if _FOREIGN_WORD.search(sample) else ("en",)
    kana = counts.pop("kana")
    counts["east"] = 2 * (counts.pop("han") + kana)
    script = max(counts, key=lambda name: counts[name])
    if script == "latin":
        return _of_latin(sample)
    if script == "east":
        return ("ja",) if kana > LEAST_KANA * counts["east"] / 2 else ("zh",)
    if script == "arabic":
        return ("ar",) if len(_NOT_ARABIC.findall(sample)) < counts[script] / 50 else ()
    if script == "cyrillic":
        return ("ru",) if _is_russian(sample, counts[script]) else ()
    return ("ko",) if script == "hangul" else ("hi",) if _is_hindi(sample) else ()


def _is_russian(sample: str, letters: int) -> bool:
    if len(_NOT_RUSSIAN.findall(sample)) > letters / 100 or _NOT_RUSSIAN_WORD.search(sample):
        return False
    # Bulgarian has none of the three, and ъ in every few words
    return bool(_RUSSIAN.search(sample)) or (
        letters < LEAST_LETTERS and sample.lower().count("ъ") <= letters / 100
    )


def _is_hindi(sample: str) -> bool:
    words = re.findall(r"[^\s।,.!?:;\"'()]+", sample)
    hindi, other = (sum(word in known for word in words) for known in (_HINDI, _NOT_HINDI))
    return hindi >= other and (hindi > 0 or len(words) < LEAST_WORDS)


def _of_latin(sample: str) -> tuple[str, ...]:
    # A name keeps its letters in every language: those of words in small letters tell this one's,
    # and one of the first word, which is written large for its place
    written = _WORD.findall(sample)
    own = [word for word in written if not word[0].isupper()]
    words = _WORD.findall(sample.lower())
    counts = dict.fromkeys((*_STOP_WORDS, "other"), 0)
    others = set()
    for word in words:
        # "l'eau" counts as "l'"
        known = _LANGUAGES_OF_WORDS.get(word) or _LANGUAGES_OF_WORDS.get(
            word.partition("'")[0] + "'"
        )
        for language in known or ():
            counts[language] += 1
        if known == ("other",):
            others.add(word)
    other = counts.pop("other")
    letters = 0
    if not sample.isascii():
        letters = sum(len(_NOT_WESTERN.findall(word)) for word in own)
        if len(written) > 1 and written[0][0].isupper() and not written[1][0].isupper():
            letters += bool(_NOT_WESTERN.search(written[0].lower()))
    if len(others) < LEAST_OTHERS and not _is_sentence(sample, words):
        other = 0  # a file's ending, a variable
    most = max(counts.values())
    if other + letters > most or _is_unknown_prose(sample, words, own, most):
        return ()
    return tuple(language for language, count in counts.items() if count == most)


def _is_sentence(sample: str, words: Sequence[str]) -> bool:
    text = sample.strip()
    return len(words) >= LEAST_SENTENCE and text[0].isupper() and text.endswith((".", "!", "?"))


def _is_unknown_prose(
    sample: str, words: Sequence[str], own: Sequence[str], stop_words: int
) -> bool:
    """Whether words without any stop words to speak of are some language's: many of them carry
    accents and are no names, or they run on as no list, table or code does.
    """
    if stop_words >= LEAST_STOP_WORDS * len(words):
        return False
    accented = sum(len(word) > 2 and not word.isascii() for word in own)
    if len(words) > 3 and accented > len(words) / 4:
        return True
    return len(words) >= LEAST_WORDS and len(words) >= LEAST_RUN * (len(_BREAK.findall(sample)) + 1)
