#!/usr/bin/env python3
"""Writes the sample corpus: German sentences and their English translations, in Multi30k's layout.

    python3 sample/generate.py                          # the committed corpus: 4000/200/200 pairs, beside this file
    python3 sample/generate.py --pairs 1000000 --out big # a million training pairs, the same 200/200 held out

The program is a small grammar that speaks German and English at once. From top to bottom:

- the lexicon: nouns with gender and plural, verbs with their principal parts, adjectives by the kind of thing they may
  describe, and what may sensibly be done by whom, to what, where
- the inflection of a phrase
- the order of a clause: verb second, verb last, prefixes that split off
- the sentences
- the files

A sentence is drawn as meaning first and then said twice, so that the translation is right by construction.

Everything is drawn with random.Random.random(), whose sequence is the same in every version of Python: the same seed
gives the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

TRAIN_PAIRS, HELD_OUT_PAIRS, SEED = 4000, 200, 2021
MAX_WORDS = 14  # of a sentence, in either language

# ------------------------------------------------------------------------------------------------------------- lexicon


class Noun(NamedTuple):
    """A noun in both languages.

    Attributes:
        gender: m, f or n, and mw for the weak masculines (der Junge, den Jungen).
        plural: "-" where nothing is counted.
        kind: the key of ADJECTIVES that may describe it.
    """

    de: str
    gender: str
    plural: str
    en: str
    en_plural: str
    kind: str

    @property
    def weak(self) -> bool:
        return self.gender.endswith("w")


def _nouns(table: str) -> dict[str, Noun]:
    rows = (line.split() for line in table.strip().splitlines())
    return {row[0]: Noun(*(cell.replace("_", " ") for cell in row)) for row in rows}


NOUNS = _nouns("""
Mann          m   Männer        man          men           person
Frau          f   Frauen        woman        women         person
Junge         mw  Jungen        boy          boys          child
Mädchen       n   Mädchen       girl         girls         child
Kind          n   Kinder        child        children      child
Lehrer        m   Lehrer        teacher      teachers      person
Lehrerin      f   Lehrerinnen   teacher      teachers      person
Arzt          m   Ärzte         doctor       doctors       person
Ärztin        f   Ärztinnen     doctor       doctors       person
Bauer         mw  Bauern        farmer       farmers       person
Nachbar       mw  Nachbarn      neighbor     neighbors     person
Nachbarin     f   Nachbarinnen  neighbor     neighbors     person
Großmutter    f   Großmütter    grandmother  grandmothers  elder
Großvater     m   Großväter     grandfather  grandfathers  elder
Student       mw  Studenten     student      students      person
Freund        m   Freunde       friend       friends       person
Hund          m   Hunde         dog          dogs          animal
Katze         f   Katzen        cat          cats          animal
Pferd         n   Pferde        horse        horses        animal
Vogel         m   Vögel         bird         birds         animal
Kuh           f   Kühe          cow          cows          animal
Ente          f   Enten         duck         ducks         animal
Maus          f   Mäuse         mouse        mice          animal
Buch          n   Bücher        book         books         reading
Brief         m   Briefe        letter       letters       reading
Zeitung       f   Zeitungen     newspaper    newspapers    paper
Geschichte    f   Geschichten   story        stories       story
Apfel         m   Äpfel         apple        apples        fruit
Birne         f   Birnen        pear         pears         fruit
Ei            n   Eier          egg          eggs          egg
Kuchen        m   Kuchen        cake         cakes         cake
Brot          n   -             bread        -             bread
Suppe         f   -             soup         -             soup
Wasser        n   -             water        -             water
Kaffee        m   -             coffee       -             coffee
Milch         f   -             milk         -             milk
Tee           m   -             tea          -             coffee
Hut           m   Hüte          hat          hats          clothes
Mantel        m   Mäntel        coat         coats         clothes
Kleid         n   Kleider       dress        dresses       clothes
Jacke         f   Jacken        jacket       jackets       clothes
Hemd          n   Hemden        shirt        shirts        clothes
Korb          m   Körbe         basket       baskets       thing
Tasche        f   Taschen       bag          bags          thing
Koffer        m   Koffer        suitcase     suitcases     thing
Ball          m   Bälle         ball         balls         thing
Blume         f   Blumen        flower       flowers       flower
Schlüssel     m   Schlüssel     key          keys          plain
Regenschirm   m   Regenschirme  umbrella     umbrellas     thing
Tasse         f   Tassen        cup          cups          thing
Glas          n   Gläser        glass        glasses       plain
Flasche       f   Flaschen      bottle       bottles       thing
Lampe         f   Lampen        lamp         lamps         thing
Uhr           f   Uhren         clock        clocks        plain
Bild          n   Bilder        picture      pictures      picture
Auto          n   Autos         car          cars          thing
Fahrrad       n   Fahrräder     bicycle      bicycles      thing
Boot          n   Boote         boat         boats         thing
Tür           f   Türen         door         doors         door
Fenster       n   Fenster       window       windows       door
Haus          n   Häuser        house        houses        place
Turm          m   Türme         tower        towers        place
Brücke        f   Brücken       bridge       bridges       place
Zimmer        n   Zimmer        room         rooms         place
Küche         f   Küchen        kitchen      kitchens      spot
Garten        m   Gärten        garden       gardens       spot
Park          m   Parks         park         parks         spot
Strand        m   Strände       beach        beaches       -
See           m   Seen          lake         lakes         -
Fluss         m   Flüsse        river        rivers        -
Wald          m   Wälder        forest       forests       -
Wiese         f   Wiesen        meadow       meadows       -
Hof           m   Höfe          yard         yards         -
Straße        f   Straßen       street       streets       -
Stadt         f   Städte        city         cities        spot
Dorf          n   Dörfer        village      villages      spot
Markt         m   Märkte        market       markets       -
Bahnhof       m   Bahnhöfe      station      stations      -
Schule        f   Schulen       school       schools       -
Bibliothek    f   Bibliotheken  library      libraries     -
Restaurant    n   Restaurants   restaurant   restaurants   place
Tisch         m   Tische        table        tables        furniture
Stuhl         m   Stühle        chair        chairs        furniture
Bank          f   Bänke         bench        benches       furniture
Sofa          n   Sofas         sofa         sofas         furniture
Bett          n   Betten        bed          beds          furniture
Baum          m   Bäume         tree         trees         tree
Dach          n   Dächer        roof         roofs         -
Bus           m   Busse         bus          buses         -
Zug           m   Züge          train        trains        -
""")

# The same German adjective may need another English one with another noun: ein großer Mann, a tall man.
ADJECTIVES = {
    kind: [tuple(pair.split("/")) for pair in pairs.split()]
    for kind, pairs in {
        "person": "alt/old jung/young groß/tall müde/tired freundlich/friendly glücklich/happy",
        "child": "klein/small groß/tall müde/tired freundlich/friendly glücklich/happy",
        "elder": "alt/old müde/tired freundlich/friendly glücklich/happy",
        "animal": "klein/small groß/big schwarz/black weiß/white braun/brown alt/old müde/tired hungrig/hungry",
        "reading": "alt/old neu/new lang/long schön/beautiful",
        "paper": "alt/old neu/new",
        "story": "lang/long schön/beautiful alt/old neu/new",
        "fruit": "rot/red grün/green groß/big klein/small süß/sweet",
        "egg": "groß/big klein/small weiß/white frisch/fresh",
        "cake": "groß/big klein/small süß/sweet frisch/fresh",
        "bread": "frisch/fresh warm/warm",
        "soup": "heiß/hot warm/warm",
        "water": "kalt/cold warm/warm frisch/fresh",
        "coffee": "heiß/hot kalt/cold",
        "milk": "kalt/cold warm/warm frisch/fresh",
        "clothes": "neu/new alt/old rot/red blau/blue schwarz/black weiß/white schön/beautiful warm/warm",
        "thing": "neu/new alt/old rot/red blau/blue grün/green schwarz/black klein/small groß/big schön/beautiful",
        "flower": "rot/red blau/blue weiß/white schön/beautiful klein/small",
        "plain": "neu/new alt/old klein/small groß/big",
        "picture": "schön/beautiful neu/new alt/old groß/big klein/small",
        "door": "groß/big klein/small alt/old neu/new",
        "place": "groß/big klein/small alt/old schön/beautiful neu/new",
        "spot": "groß/big klein/small schön/beautiful",
        "furniture": "alt/old neu/new klein/small groß/big rot/red weiß/white",
        "tree": "alt/old groß/tall klein/small",
        "-": "",
    }.items()
}
ADJECTIVES["milk"] = ADJECTIVES["water"]


class Verb(NamedTuple):
    """A verb's principal parts. A German prefix that splits off stands apart: auf, machen, macht, gemacht."""

    prefix: str
    infinitive: str  # also the plural: sie machen
    singular: str
    participle: str
    auxiliary: str  # hat or ist
    base: str
    third: str
    past: str
    ing: str  # "-": the verb has no progressive form (he knows)


def _verbs(table: str) -> dict[str, Verb]:
    verbs = {}
    for line in table.strip().splitlines():
        german, *parts = line.split()
        word, _, sense = german.partition(":")  # tragen:wear and tragen:carry are two verbs in English
        prefix, _, infinitive = word.rpartition("+")
        verbs[word.replace("+", "") + (":" + sense if sense else "")] = Verb(
            prefix, infinitive, *(part.replace("_", " ") for part in parts)
        )
    return verbs


VERBS = _verbs("""
schlafen      schläft       geschlafen    hat  sleep       sleeps       slept       sleeping
lachen        lacht         gelacht       hat  laugh       laughs       laughed     laughing
lächeln       lächelt       gelächelt     hat  smile       smiles       smiled      smiling
weinen        weint         geweint       hat  cry         cries        cried       crying
singen        singt         gesungen      hat  sing        sings        sang        singing
tanzen        tanzt         getanzt       hat  dance       dances       danced      dancing
spielen       spielt        gespielt      hat  play        plays        played      playing
schwimmen     schwimmt      geschwommen   ist  swim        swims        swam        swimming
arbeiten      arbeitet      gearbeitet    hat  work        works        worked      working
lernen        lernt         gelernt       hat  study       studies      studied     studying
kochen        kocht         gekocht       hat  cook        cooks        cooked      cooking
warten        wartet        gewartet      hat  wait        waits        waited      waiting
rennen        rennt         gerannt       ist  run         runs         ran         running
stehen        steht         gestanden     hat  stand       stands       stood       standing
sitzen        sitzt         gesessen      hat  sit         sits         sat         sitting
liegen        liegt         gelegen       hat  lie         lies         lay         lying
bleiben       bleibt        geblieben     ist  stay        stays        stayed      staying
gehen         geht          gegangen      ist  go          goes         went        going
kommen        kommt         gekommen      ist  come        comes        came        coming
fahren        fährt         gefahren      ist  go          goes         went        going
auf+stehen    steht         gestanden     ist  get_up      gets_up      got_up      getting_up
auf+wachen    wacht         gewacht       ist  wake_up     wakes_up     woke_up     waking_up
ein+schlafen  schläft       geschlafen    ist  fall_asleep falls_asleep fell_asleep falling_asleep
an+kommen     kommt         gekommen      ist  arrive      arrives      arrived     arriving
zurück+kommen kommt         gekommen      ist  come_back   comes_back   came_back   coming_back
ein+kaufen    kauft         gekauft       hat  shop        shops        shopped     shopping
lesen         liest         gelesen       hat  read        reads        read        reading
schreiben     schreibt      geschrieben   hat  write       writes       wrote       writing
essen         isst          gegessen      hat  eat         eats         ate         eating
trinken       trinkt        getrunken     hat  drink       drinks       drank       drinking
malen         malt          gemalt        hat  paint       paints       painted     painting
kaufen        kauft         gekauft       hat  buy         buys         bought      buying
verkaufen     verkauft      verkauft      hat  sell        sells        sold        selling
tragen:carry  trägt         getragen      hat  carry       carries      carried     carrying
tragen:wear   trägt         getragen      hat  wear        wears        wore        wearing
suchen        sucht         gesucht       hat  look_for    looks_for    looked_for  looking_for
finden        findet        gefunden      hat  find        finds        found       finding
verlieren     verliert      verloren      hat  lose        loses        lost        losing
vergessen     vergisst      vergessen     hat  forget      forgets      forgot      forgetting
auf+machen    macht         gemacht       hat  open        opens        opened      opening
zu+machen     macht         gemacht       hat  close       closes       closed      closing
auf+räumen    räumt         geräumt       hat  clean_up    cleans_up    cleaned_up  cleaning_up
an+rufen      ruft          gerufen       hat  call        calls        called      calling
ab+holen      holt          geholt        hat  pick_up     picks_up     picked_up   picking_up
an+ziehen     zieht         gezogen       hat  put_on      puts_on      put_on      putting_on
aus+ziehen    zieht         gezogen       hat  take_off    takes_off    took_off    taking_off
weg+werfen    wirft         geworfen      hat  throw_away  throws_away  threw_away  throwing_away
waschen       wäscht        gewaschen     hat  wash        washes       washed      washing
putzen        putzt         geputzt       hat  clean       cleans       cleaned     cleaning
reparieren    repariert     repariert     hat  repair      repairs      repaired    repairing
bauen         baut          gebaut        hat  build       builds       built       building
schneiden     schneidet     geschnitten   hat  cut         cuts         cut         cutting
backen        backt         gebacken      hat  bake        bakes        baked       baking
fotografieren fotografiert  fotografiert  hat  photograph  photographs  photographed photographing
füttern       füttert       gefüttert     hat  feed        feeds        fed         feeding
beobachten    beobachtet    beobachtet    hat  watch       watches      watched     watching
besuchen      besucht       besucht       hat  visit       visits       visited     visiting
jagen         jagt          gejagt        hat  chase       chases       chased      chasing
helfen        hilft         geholfen      hat  help        helps        helped      helping
folgen        folgt         gefolgt       ist  follow      follows      followed    following
danken        dankt         gedankt       hat  thank       thanks       thanked     thanking
zu+hören      hört          gehört        hat  listen_to   listens_to   listened_to listening_to
gehören       gehört        gehört        hat  belong_to   belongs_to   belonged_to -
geben         gibt          gegeben       hat  give        gives        gave        giving
schenken      schenkt       geschenkt     hat  give        gives        gave        giving
zeigen        zeigt         gezeigt       hat  show        shows        showed      showing
bringen       bringt        gebracht      hat  bring       brings       brought     bringing
erzählen      erzählt       erzählt       hat  tell        tells        told        telling
sprechen      spricht       gesprochen    hat  talk        talks        talked      talking
stellen       stellt        gestellt      hat  put         puts         put         putting
legen         legt          gelegt        hat  put         puts         put         putting
haben         hat           gehabt        hat  have        has         had         -
lieben        liebt         geliebt       hat  love        loves        loved       -
sehen         sieht         gesehen       hat  see         sees         saw         -
wissen        weiß          gewusst       hat  know        knows        knew        -
glauben       glaubt        geglaubt      hat  believe     believes     believed    -
sagen         sagt          gesagt        hat  say         says         said        -
hören         hört          gehört        hat  hear        hears        heard       -
regnen        regnet        geregnet      hat  rain        rains        rained      raining
schneien      schneit       geschneit     hat  snow        snows        snowed      snowing
scheinen      scheint       geschienen    hat  shine       shines       shone       shining
wehen         weht          geweht        hat  blow        blows        blew        blowing
""")
VERBS["sein"] = Verb("", "sind", "ist", "gewesen", "ist", "are", "is", "was", "-")

MODALS = {  # German singular and plural, English singular and plural
    "can": ("kann", "können", "can", "can"),
    "must": ("muss", "müssen", "must", "must"),
    "want": ("will", "wollen", "wants to", "want to"),
    "like": ("möchte", "möchten", "would like to", "would like to"),
}


class Place(NamedTuple):
    """A noun with its prepositions for being there and, where `to` is not empty, for going there.

    in, an, auf, vor, hinter, unter and neben take the dative for a place and the accusative for a goal. zu takes the
    dative.
    """

    noun: Noun
    at: str
    en_at: str
    to: str
    en_to: str


def _places(table: str) -> dict[str, tuple[Place, ...]]:
    groups: dict[str, list[Place]] = {}
    for line in table.strip().splitlines():
        noun, at, en_at, to, en_to, *names = line.split()
        place = Place(NOUNS[noun], at, en_at.replace("_", " "), to.strip("-"), en_to.replace("_", " "))
        for name in names:
            groups.setdefault(name, []).append(place)
    return {name: tuple(places) for name, places in groups.items()}


PLACES = _places("""
Park        in     in           in     to       out walk wait
Garten      in     in           in     into     out walk rest yard bring
Strand      an     on           an     to       out walk
See         an     at           zu     to       walk out
See         in     in           -      -        swim
Fluss       in     in           -      -        swim
Fluss       an     by           zu     to       walk out
Wald        in     in           in     into     walk run
Wiese       auf    in           auf    into     out walk run graze
Hof         in     in           in     into     out walk run graze yard
Straße      auf    on           auf    onto     run
Brücke      auf    on           auf    onto     wait run
Markt       auf    at           auf    to       walk shop
Stadt       in     in           in     to       walk shop work town arrive
Dorf        in     in           in     to       walk work arrive
Bahnhof     an     at           zu     to       walk wait arrive station
Schule      in     at           in     to       walk study work
Bibliothek  in     in           in     to       walk study work
Restaurant  in     in           in     to       walk eat work
Küche       in     in           in     into     walk home cook eat bring
Haus        in     in           in     into     walk home rest bring
Zimmer      in     in           in     into     walk home study rest bring
Haus        vor    in_front_of  vor    in_front_of  out wait graze
Haus        hinter behind       hinter behind   out run graze
Schule      vor    in_front_of  -      -        wait
Baum        unter  under        unter  under    out rest graze
Bank        auf    on           -      -        seat bed
Sofa        auf    on           auf    onto     seat bed jump
Bett        auf    on           auf    onto     bed jump
Fenster     an     at           -      -        stand
Tür         an     at           -      -        stand
Tisch       auf    on           auf    on       surface
Stuhl       auf    on           auf    on       surface
Bett        auf    on           auf    on       surface
Tisch       unter  under        unter  under    surface
Tisch       neben  next_to      neben  next_to  surface
Bett        neben  next_to      neben  next_to  surface
""")


def _places_of(groups: str) -> tuple[Place, ...]:
    return tuple(place for group in groups.split() for place in PLACES[group])


def _group(words: str) -> tuple[Noun, ...]:
    return tuple(NOUNS[word] for word in words.split())


CHILDREN = _group("Junge Mädchen Kind")
ADULTS = _group("Mann Frau Lehrer Lehrerin Arzt Ärztin Bauer Nachbar Nachbarin Großmutter Großvater Student")
PEOPLE = CHILDREN + ADULTS
GENDERED = tuple(noun for noun in PEOPLE if noun.gender != "n")  # er and sie are he and she. es for a child is neither.
PETS = _group("Hund Katze")
ANIMALS = _group("Hund Katze Pferd Vogel Kuh Ente")
GRAZERS = _group("Pferd Kuh Hund Katze Ente")
WOMEN = _group("Frau Mädchen Lehrerin Ärztin Nachbarin Großmutter")
CLOTHES = _group("Hut Mantel Jacke Hemd")
DRESS = _group("Kleid")
STANDING = _group("Korb Tasche Koffer Tasse Glas Flasche Lampe")  # these stand where they are put (stellen),
LYING = _group("Buch Brief Zeitung Schlüssel Apfel Birne Hut Jacke Ball")  # and these lie (legen)
GIFTS = _group("Buch Apfel Birne Kuchen Blume Ball Tasche Hut Uhr Bild")
BELONGINGS = _group("Auto Fahrrad Boot Haus Tasche Koffer Ball Hund Katze Pferd Uhr Regenschirm")


class Action(NamedTuple):
    """What may sensibly be done: by whom, to what, where.

    Attributes:
        flags: letters:
            o: once, not every day
            u: unwanted, no one wants to
            w: work, which one must do
            s: short, not a while
            p: needs its place
            i: of things not known yet (ein, zwei)
            e: used up, so that every day there is another
            c: of clothes, each doer his own
    """

    verb: Verb
    doers: tuple[Noun, ...]
    objects: tuple[Noun, ...] = ()
    places: tuple[Place, ...] = ()
    flags: str = ""
    case: str = "acc"
    fixed: tuple[str, str] | None = None  # an object that never changes: Fußball spielen


def _action(
    verb: str, doers: tuple[Noun, ...], objects: str | tuple[Noun, ...] = (), places: str = "", **rest: object
) -> Action:
    if isinstance(objects, str):
        objects = _group(objects)
    return Action(VERBS[verb], doers, objects, _places_of(places), **rest)


DEEDS = (  # of people: what a caption would say of someone
    _action("singen", PEOPLE, "", "out home"),
    _action("tanzen", PEOPLE, "", "out home"),
    _action("schlafen", PEOPLE, "", "bed rest", flags="w"),
    _action("arbeiten", ADULTS, "", "work home", flags="w"),
    _action("lernen", PEOPLE, "", "study", flags="w"),
    _action("kochen", PEOPLE, "", "cook", flags="w"),
    _action("schwimmen", PEOPLE, "", "swim"),
    _action("warten", PEOPLE, "", "wait", flags="wup"),
    _action("sitzen", PEOPLE, "", "seat", flags="up"),
    _action("stehen", PEOPLE, "", "stand wait", flags="up"),
    _action("einkaufen", ADULTS, "", "shop", flags="w"),
    _action("spielen", CHILDREN, "", "out home"),
    _action("spielen", CHILDREN, "", "out", fixed=("Fußball", "soccer")),
    _action("spielen", PEOPLE, "", "home", fixed=("Karten", "cards")),
    _action("spielen", PEOPLE, "", "out home", fixed=("Gitarre", "the guitar")),
    _action("lesen", PEOPLE, "Buch Brief Zeitung", "out home seat"),
    _action("lesen", PEOPLE, "Buch Zeitung", "out home study"),
    _action("schreiben", PEOPLE, "Brief", "home study", flags="we"),
    _action("schreiben", ADULTS, "Buch", "home study", flags="oe"),
    _action("essen", PEOPLE, "Apfel Birne Ei Kuchen Brot Suppe", "eat", flags="e"),
    _action("essen", PEOPLE, "Apfel Birne Kuchen Brot", "out eat", flags="e"),
    _action("trinken", PEOPLE, "Wasser Kaffee Milch Tee", "eat", flags="e"),
    _action("malen", PEOPLE, "Bild Haus Baum Blume", "out home", flags="e"),
    _action("kaufen", PEOPLE, "Apfel Birne Ei Brot Milch Zeitung Blume", "shop", flags="wi"),
    _action("kaufen", ADULTS, "Hut Mantel Jacke Hemd Lampe Uhr Fahrrad Auto", "town", flags="oi"),
    _action("verkaufen", ADULTS, "Apfel Birne Ei Kuchen Brot Blume", "shop", flags="we"),
    _action("tragen:carry", PEOPLE, "Korb Tasche Koffer Lampe Kuchen", flags="w"),
    _action("tragen:wear", PEOPLE, CLOTHES, flags="c"),
    _action("tragen:wear", WOMEN, DRESS, flags="c"),
    _action("suchen", PEOPLE, "Schlüssel Ball Hut Tasche Katze Hund", "out home", flags="ow"),
    _action("aufmachen", PEOPLE, "Tür Fenster Brief Flasche Koffer", flags="ws"),
    _action("zumachen", PEOPLE, "Tür Fenster Koffer", flags="ws"),
    _action("aufräumen", PEOPLE, "Zimmer Küche Haus", flags="w"),
    _action("anrufen", PEOPLE, GENDERED, flags="ws"),
    _action("abholen", ADULTS, PEOPLE, "station", flags="ws"),
    _action("anziehen", PEOPLE, CLOTHES, flags="cs"),
    _action("anziehen", WOMEN, DRESS, flags="cs"),
    _action("ausziehen", PEOPLE, "Mantel Jacke Hemd", flags="cs"),
    _action("wegwerfen", PEOPLE, "Zeitung Brief Hemd Flasche", flags="ows"),
    _action("waschen", PEOPLE, "Auto Hemd Hund Pferd", "yard", flags="w"),
    _action("putzen", PEOPLE, "Fenster Küche Zimmer Fahrrad", flags="w"),
    _action("reparieren", ADULTS, "Auto Fahrrad Uhr Lampe Tür Boot", flags="ow"),
    _action("bauen", ADULTS, "Haus Boot Turm Brücke", flags="ow"),
    _action("schneiden", PEOPLE, "Brot Kuchen Apfel", "cook", flags="we"),
    _action("backen", PEOPLE, "Kuchen Brot", "cook", flags="we"),
    _action("fotografieren", PEOPLE, "Vogel Pferd Brücke Turm Haus Blume Kind"),
    _action("füttern", PEOPLE, ANIMALS, "graze", flags="w"),
    _action("beobachten", PEOPLE, "Vogel Ente Pferd Katze Hund", "out"),
    _action("besuchen", PEOPLE, GENDERED, flags="w"),
    _action("helfen", PEOPLE, PEOPLE, "home", flags="w", case="dat"),
    _action("danken", PEOPLE, GENDERED, flags="su", case="dat"),
    _action("zuhören", PEOPLE, GENDERED, case="dat"),
)
ANIMAL_DEEDS = (
    _action("schlafen", PETS, "", "bed rest"),
    _action("schlafen", GRAZERS, "", "graze"),
    _action("liegen", PETS, "", "bed rest", flags="p"),
    _action("stehen", _group("Pferd Kuh"), "", "graze", flags="p"),
    _action("rennen", _group("Hund Katze Pferd"), "", "run", flags="p"),
    _action("spielen", PETS, "", "out home"),
    _action("schwimmen", _group("Ente Hund"), "", "swim"),
    _action("trinken", ANIMALS, "Wasser", "graze", flags="e"),
    _action("trinken", PETS, "Milch Wasser", "home", flags="e"),
    _action("jagen", _group("Hund"), "Katze Ente Vogel", "out"),
    _action("jagen", _group("Katze"), "Vogel", "out"),
    _action("jagen", _group("Katze"), "Maus", "out home"),
    _action("suchen", _group("Hund"), "Ball", "out home", flags="o"),
)
LOSSES = (  # said in the perfect tense only, of one thing
    _action("verlieren", PEOPLE, "Schlüssel Ball Hut Tasche Brief"),
    _action("vergessen", PEOPLE, "Schlüssel Tasche Regenschirm Hut Mantel"),
)
FINDS = (
    _action("finden", PEOPLE, "Schlüssel Ball Hut Tasche Brief Katze Hund"),
    _action("kaufen", ADULTS, "Hut Mantel Fahrrad Auto Haus Boot", flags="oi"),
    _action("kaufen", WOMEN, DRESS, flags="oi"),
)


def _by_verb(actions: tuple[Action, ...], verbs: str) -> tuple[Action, ...]:
    return tuple(action for action in actions if action.verb in [VERBS[verb] for verb in verbs.split()])


CHEERFUL = _by_verb(DEEDS, "singen tanzen schwimmen spielen")
TIRING = _by_verb(DEEDS, "tanzen schwimmen arbeiten aufräumen waschen kochen lernen")
PLEASURES = _by_verb(DEEDS, "singen tanzen schwimmen kochen spielen lesen essen trinken malen backen")
WORK = tuple(a for a in DEEDS if "w" in a.flags)
WISHES = tuple(a for a in DEEDS if "u" not in a.flags)
HABITS = tuple(a for a in DEEDS if "o" not in a.flags)
ANIMAL_HABITS = tuple(a for a in ANIMAL_DEEDS if "o" not in a.flags)
LASTING = tuple(a for a in HABITS if "s" not in a.flags)

# German, English. In front they take the verb with them (Heute liest der Mann ...), but not in English.
NOW = (("heute", "today"), ("jetzt", "now"))
PAST = (
    ("gestern", "yesterday"),
    ("gestern Abend", "yesterday evening"),
    ("heute Morgen", "this morning"),
    ("am Montag", "on Monday"),
)
LONG_PAST = (("letzte Woche", "last week"), ("letztes Jahr", "last year"))
SOON = (("heute", "today"), ("morgen", "tomorrow"), ("heute Abend", "this evening"), ("am Sonntag", "on Sunday"))
HABIT = (
    ("jeden Tag", "every day"),
    ("jeden Morgen", "every morning"),
    ("am Abend", "in the evening"),
    ("oft", "often"),
)
BEFORE_VERB = ("often",)  # English says these between subject and verb

# ---------------------------------------------------------------------------------------------------------- inflection

GENDERS = ("m", "f", "n", "p")  # p: plural, in all genders alike


def _paradigm(table: str) -> dict[tuple[str, str], str]:
    rows = (line.split() for line in table.strip().splitlines())
    return {(row[0], gender): end.strip("-") for row in rows for gender, end in zip(GENDERS, row[1:], strict=True)}


#                              m    f    n    plural
DEFINITE = _paradigm("""nom  der  die  das  die
                        acc  den  die  das  die
                        dat  dem  der  dem  den
                        gen  des  der  des  der""")
EIN = _paradigm("""     nom  -    -e   -    -e
                        acc  -en  -e   -    -e
                        dat  -em  -er  -em  -en
                        gen  -es  -er  -es  -er""")
WEAK = _paradigm("""    nom  -e   -e   -e   -en
                        acc  -en  -e   -e   -en
                        dat  -en  -en  -en  -en
                        gen  -en  -en  -en  -en""")
MIXED = _paradigm("""   nom  -er  -e   -es  -en
                        acc  -en  -e   -es  -en
                        dat  -en  -en  -en  -en
                        gen  -en  -en  -en  -en""")
STRONG = _paradigm("""  nom  -er  -e   -es  -e
                        acc  -en  -e   -es  -e
                        dat  -em  -er  -em  -en
                        gen  -en  -er  -en  -er""")
NUMBERS = {"zwei": "two", "drei": "three", "viele": "many", "einige": "some"}
POSSESSIVES = {"m": ("sein", "his"), "f": ("ihr", "her"), "p": ("ihr", "their")}
RELATIVES = {**DEFINITE, ("dat", "p"): "denen", ("gen", "m"): "dessen", ("gen", "f"): "deren"}
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "zu dem": "zum", "zu der": "zur"}


@cache
def noun_form(noun: Noun, plural: bool, case: str) -> str:
    """A noun in its case.

    >>> [noun_form(NOUNS["Kind"], False, case) for case in ("nom", "acc", "dat", "gen")]
    ['Kind', 'Kind', 'Kind', 'Kindes']
    >>> [noun_form(NOUNS["Kind"], True, case) for case in ("nom", "dat")]
    ['Kinder', 'Kindern']
    >>> [noun_form(NOUNS["Junge"], False, case) for case in ("nom", "acc", "dat", "gen")]
    ['Junge', 'Jungen', 'Jungen', 'Jungen']
    """
    if plural:
        return noun.plural + "n" * (case == "dat" and noun.plural[-1] not in "ns")
    if noun.weak and case != "nom":
        return noun.plural  # den Jungen, dem Nachbarn: sounds like the plural
    if case == "gen" and noun.gender != "f":
        return noun.de + ("es" if len(re.findall("[aeiouäöü]+", noun.de.lower())) == 1 else "s")
    return noun.de


def adjective_form(adjective: str, ending: str) -> str:
    """An adjective before a noun: ein müder Mann.

    >>> adjective_form("alt", "en"), adjective_form("müde", "er")
    ('alten', 'müder')
    """
    return adjective.removesuffix("e") + ending


@cache
def german_phrase(determiner: str, adjective: str, noun: Noun, plural: bool, case: str) -> str:
    """Article, adjective and noun.

    The adjective is weak after der, mixed after ein and sein, and strong where nothing before it shows the case.

    Args:
        determiner: "der", "ein", "sein", "ihr", "kein", a key of NUMBERS, or "" for none.
        adjective: its bare form, or "".
        case: "nom", "acc", "dat" or "gen".

    >>> man, child, milk = NOUNS["Mann"], NOUNS["Kind"], NOUNS["Milch"]
    >>> german_phrase("der", "alt", man, False, "nom"), german_phrase("ein", "alt", man, False, "nom")
    ('der alte Mann', 'ein alter Mann')
    >>> german_phrase("ein", "klein", child, False, "acc"), german_phrase("ein", "klein", child, False, "dat")
    ('ein kleines Kind', 'einem kleinen Kind')
    >>> german_phrase("zwei", "klein", child, True, "dat"), german_phrase("", "kalt", milk, False, "acc")
    ('zwei kleinen Kindern', 'kalte Milch')
    """
    cell = (case, "p" if plural else noun.gender[0])
    if determiner == "der":
        article, endings = DEFINITE[cell], WEAK
    elif determiner in ("ein", "sein", "ihr", "kein"):
        article, endings = determiner + EIN[cell], MIXED
    elif determiner in ("viele", "einige"):
        article, endings = determiner.removesuffix("e") + STRONG[cell], STRONG
    else:
        article, endings = determiner, STRONG
    words = (article, adjective and adjective_form(adjective, endings[cell]), noun_form(noun, plural, case))
    return " ".join(word for word in words if word)


@cache
def english_phrase(determiner: str, adjective: str, noun: Noun, plural: bool) -> str:
    """The same phrase in English. `determiner` is the English one, "a" for a and an.

    >>> english_phrase("a", "", NOUNS["Apfel"], False), english_phrase("a", "red", NOUNS["Apfel"], False)
    ('an apple', 'a red apple')
    """
    words = [word for word in (adjective, noun.en_plural if plural else noun.en) if word]
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return " ".join([determiner, *words] if determiner else words)


def german_place(preposition: str, phrase: str) -> str:
    """A preposition before its phrase, run together with the article where German does.

    >>> german_place("in", "dem Park"), german_place("in", "den Park"), german_place("in", "das kleine Haus")
    ('im Park', 'in den Park', 'ins kleine Haus')
    """
    article, _, rest = phrase.partition(" ")
    both = f"{preposition} {article}"
    return f"{CONTRACTIONS.get(both, both)} {rest}"


# -------------------------------------------------------------------------------------------------------------- clause


class Phrase(NamedTuple):
    """Something said in both languages. `gender` is German grammar's m, f, n or p, `noun` is what it is about."""

    de: str
    en: str
    gender: str = ""
    noun: Noun | None = None
    definite: bool = True

    @property
    def plural(self) -> bool:
        return self.gender == "p"


class Clause(NamedTuple):
    """Who does what, in no order yet. `tense`: now, habit, past, gern, or a key of MODALS."""

    subject: Phrase
    verb: Verb
    tense: str = "now"
    dative: Phrase | None = None
    accusative: Phrase | None = None
    complement: Phrase | None = None  # next to the verb: a goal, a predicate, auf den Bus warten
    manner: tuple[str, str] | None = None
    place: Phrase | None = None
    time: tuple[str, str] | None = None


def _verb_parts(verb: Verb, tense: str, plural: bool) -> tuple[str, str]:
    """The finite verb and what stands at the end of a main clause: ('macht', 'auf'), ('hat', 'aufgemacht')."""
    if tense == "past":
        auxiliary = {"hat": ("hat", "haben"), "ist": ("ist", "sind")}[verb.auxiliary]
        return auxiliary[plural], verb.prefix + verb.participle
    if tense in MODALS:
        return MODALS[tense][plural], verb.prefix + verb.infinitive
    return (verb.infinitive if plural else verb.singular), verb.prefix


def _middle(clause: Clause, without: str = "") -> list[str]:
    """What stands between the two parts of the German verb.

    The order: time, dative, an object already known (das Buch), manner, place, a new object (ein Buch), complement.
    """
    known = clause.accusative is not None and clause.accusative.definite
    return [
        clause.time[0] if clause.time and without != "time" else "",
        clause.dative.de if clause.dative else "",
        clause.accusative.de if known else "",
        clause.manner[0] if clause.manner else "",
        clause.place.de if clause.place and without != "place" else "",
        clause.accusative.de if clause.accusative and not known else "",
        clause.complement.de if clause.complement else "",
    ]


def _join(words: list[str]) -> str:
    return " ".join([word for word in words if word])


def german_main(clause: Clause, front: str = "") -> str:
    """A main clause: the finite verb second, its prefix, participle or infinitive last.

    Args:
        front: what stands first. "" is the subject. "time" or "place" is that, and the subject follows the verb.
            "clause" is a clause said before this one, so that the verb follows at once.
    """
    finite, last = _verb_parts(clause.verb, clause.tense, clause.subject.plural)
    first = {"": clause.subject.de, "clause": ""}.get(front)
    if first is None:
        first = clause.time[0] if front == "time" else clause.place.de
    return _join([first, finite, clause.subject.de if front else "", *_middle(clause, front), last])


def german_subordinate(conjunction: str, clause: Clause, subject: bool = True) -> str:
    """A subordinate clause: the finite verb last, its prefix joined to it: weil er die Tür aufmacht."""
    finite, last = _verb_parts(clause.verb, clause.tense, clause.subject.plural)
    end = last + finite if clause.tense in ("now", "habit") else f"{last} {finite}"
    return _join([conjunction, clause.subject.de if subject else "", *_middle(clause), end])


def german_purpose(clause: Clause) -> str:
    """um ... zu: zu stands before the infinitive and inside a verb with a prefix (um die Tür aufzumachen)."""
    verb = clause.verb
    end = f"{verb.prefix}zu{verb.infinitive}" if verb.prefix else f"zu {verb.infinitive}"
    return _join(["um", *_middle(clause), end])


def english_verb(verb: Verb, tense: str, plural: bool) -> str:
    """The English verb: now is the progressive where there is one, habit the simple present, past the simple past."""
    if tense == "past":
        return verb.past
    if tense == "gern":
        return f"{'like' if plural else 'likes'} to {verb.base}"
    if tense in MODALS:
        return f"{MODALS[tense][2 + plural]} {verb.base}"
    if tense == "now" and verb.ing != "-":
        return ("are " if plural else "is ") + verb.ing
    return verb.base if plural else verb.third


def _english_rest(clause: Clause, time: bool = True) -> list[str]:
    return [
        clause.dative.en if clause.dative else "",
        clause.accusative.en if clause.accusative else "",
        clause.complement.en if clause.complement else "",
        clause.manner[1] if clause.manner else "",
        clause.place.en if clause.place else "",
        clause.time[1] if time and clause.time else "",
    ]


def english_clause(clause: Clause, front: str = "", subject: bool = True) -> str:
    """Subject, verb, objects, manner, place, time. `front` "time" puts the time first."""
    verb = english_verb(clause.verb, clause.tense, clause.subject.plural)
    who = clause.subject.en if subject else ""
    if front == "time":
        return _join([clause.time[1], who, verb, *_english_rest(clause, time=False)])
    if clause.time and clause.time[1] in BEFORE_VERB:
        return _join([who, clause.time[1], verb, *_english_rest(clause, time=False)])
    return _join([who, verb, *_english_rest(clause)])


# ------------------------------------------------------------------------------------------------------------- drawing


class Dice:
    """Draws from a seed with random() alone, because the other methods may change between versions of Python."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, choices):
        return choices[int(self.random() * len(choices))]


COUNTED = ("der", "der", "zwei", "drei", "viele", "einige")
ENGLISH_DETERMINERS = {"der": "the", "ein": "a", "kein": "no", "": "", **NUMBERS}


@cache
def _phrase(determiner: str, owner: str, adjective: tuple[str, str], noun: Noun, plural: bool, case: str) -> Phrase:
    english = POSSESSIVES[owner][1] if owner else ENGLISH_DETERMINERS[determiner]
    return Phrase(
        german_phrase(determiner, adjective[0], noun, plural, case),
        english_phrase(english, adjective[1], noun, plural),
        "p" if plural else noun.gender[0],
        noun,
        determiner in ("der", "sein", "ihr"),
    )


def _adjective(dice: Dice, noun: Noun, probability: float) -> tuple[str, str]:
    choices = ADJECTIVES[noun.kind]
    return dice.pick(choices) if choices and dice.random() < probability else ("", "")


def _other(dice: Dice, nouns: tuple[Noun, ...], phrase: Phrase | None) -> Noun:
    """A noun that does not name the same sort as the phrase: the doctor helps no doctor."""
    noun = dice.pick(nouns)
    while phrase and phrase.noun and noun.en == phrase.noun.en:
        noun = dice.pick(nouns)
    return noun


def possession(phrase: Phrase, owner: Noun) -> Phrase:
    """The thing and its owner in the genitive.

    >>> possession(Phrase("den Hund", "the dog"), NOUNS["Nachbar"])[:2]
    ('den Hund des Nachbarn', "the neighbor's dog")
    """
    german = german_phrase("der", "", owner, False, "gen")
    return phrase._replace(de=f"{phrase.de} {german}", en=f"the {owner.en}'s {phrase.en.removeprefix('the ')}")


def draw_subject(
    dice: Dice,
    nouns: tuple[Noun, ...],
    adjectives: float = 0.22,
    other: Phrase | None = None,
    dressed: bool = False,
) -> Phrase:
    """A man, the two dogs, the neighbor's dog, a woman in a red dress if `dressed`. Not the same sort as `other`."""
    noun = _other(dice, nouns, other)
    plural = dice.random() < 0.25
    determiner = dice.pick(COUNTED) if plural else "der" if dice.random() < 0.6 else "ein"
    phrase = _phrase(determiner, "", _adjective(dice, noun, adjectives), noun, plural, "nom")
    if plural or dice.random() > 0.08:
        return phrase
    if noun in ANIMALS:
        return possession(phrase, dice.pick(PEOPLE)) if determiner == "der" else phrase
    if not dressed:
        return phrase
    worn = draw_object(dice, CLOTHES + DRESS * (noun in WOMEN), "dat", determiner="ein", adjectives=0.6)
    german, english = ("mit", "with") if worn.noun is NOUNS["Hut"] else ("in", "in")
    return phrase._replace(de=f"{phrase.de} {german} {worn.de}", en=f"{phrase.en} {english} {worn.en}")


OWNED = ("clothes", "thing", "plain", "animal", "reading", "paper", "picture")


def draw_object(
    dice: Dice,
    nouns: tuple[Noun, ...],
    case: str = "acc",
    subject: Phrase | None = None,
    determiner: str = "",
    adjectives: float = 0.18,
    one: bool = False,
    own: bool = False,
) -> Phrase:
    """An object in its case, now and then the subject's own: the man feeds his dog.

    Args:
        determiner: the one to use with a single thing, "new" for what nobody has heard of yet, or "" for any.
        one: no plural.
        own: the subject's, not just any.
    """
    noun = _other(dice, nouns, subject)
    adjective = _adjective(dice, noun, adjectives)
    if noun.plural == "-":  # bread and milk are not counted
        known = determiner != "new" and dice.random() < 0.4
        return _phrase("der" if known else "", "", adjective, noun, False, case)
    if determiner not in ("", "new"):
        return _phrase(determiner, "", adjective, noun, False, case)
    draw = dice.random()
    if draw < 0.25 and not one and noun.kind not in ("place", "spot"):
        return _phrase(dice.pick(COUNTED[2:] if determiner else COUNTED), "", adjective, noun, True, case)
    if determiner or (draw > 0.65 and not own):
        return _phrase("ein", "", adjective, noun, False, case)
    if (own or draw > 0.5) and noun.kind in OWNED and subject and subject.noun in PEOPLE:
        if subject.plural or subject.noun in GENDERED:
            german, _ = POSSESSIVES[subject.gender]
            return _phrase(german, subject.gender, adjective, noun, False, case)
        return possession(_phrase("der", "", adjective, noun, False, case), _other(dice, PEOPLE, subject))
    return _phrase("der", "", adjective, noun, False, case)


@cache
def _place_phrase(place: Place, goal: bool, determiner: str, adjective: tuple[str, str]) -> Phrase:
    german, english = (place.to, place.en_to) if goal else (place.at, place.en_at)
    case = "acc" if goal and german != "zu" else "dat"
    phrase = german_place(german, german_phrase(determiner, adjective[0], place.noun, False, case))
    translation = english_phrase(ENGLISH_DETERMINERS[determiner], adjective[1], place.noun, False)
    return Phrase(phrase, f"{english} {translation}")


def draw_place(dice: Dice, places: tuple[Place, ...], goal: bool = False) -> Phrase:
    """In the garden, or as a goal, into the garden."""
    place = dice.pick(places)
    adjective = _adjective(dice, place.noun, 0.1)
    return _place_phrase(place, goal, "der" if goal or dice.random() < 0.85 else "ein", adjective)


def draw_clause(
    dice: Dice,
    actions: tuple[Action, ...],
    tense: str = "now",
    places: float = 0.5,
    subject: Phrase | None = None,
    other: Phrase | None = None,
    times: tuple[tuple[str, str], ...] = (),
) -> Clause:
    """Someone does something, in a place with the given probability.

    Args:
        subject: who, if that is settled.
        other: who else is spoken of, so that the new subject is of another sort.
        times: one of them is said where there is no place, and sometimes beside a place.
    """
    action = dice.pick(actions)
    while other and all(noun.en == other.noun.en for noun in action.doers):
        action = dice.pick(actions)
    dressed = tense in ("now", "past") and "c" not in action.flags and action.verb is not VERBS["schwimmen"]
    subject = subject or draw_subject(dice, action.doers, other=other, dressed=dressed)
    dative = accusative = place = time = None
    if action.fixed:
        accusative = Phrase(*action.fixed, definite=False)
    elif action.case == "dat":
        dative = draw_object(dice, action.objects, "dat", subject)
    elif "c" in action.flags and subject.plural:  # die Frauen tragen rote Hüte
        noun = dice.pick(action.objects)
        accusative = _phrase("", "", _adjective(dice, noun, 0.4), noun, True, "acc")
    elif action.objects:
        another = "i" in action.flags or ("e" in action.flags and tense == "habit")
        lost = action in LOSSES
        one = lost or "c" in action.flags or "o" in action.flags or action in FINDS
        accusative = draw_object(dice, action.objects, "acc", subject, "new" * another, one=one, own=lost)
    if action.places and ("p" in action.flags or dice.random() < places):
        place = draw_place(dice, action.places)
    if times and (not place or dice.random() < 0.25) and not (tense in MODALS and "c" in action.flags):
        if "o" not in action.flags:
            time = dice.pick(times)
        elif times is PAST:
            time = dice.pick(LONG_PAST)
    return Clause(subject, action.verb, tense, dative, accusative, place=place, time=time)


def both(dice: Dice, clause: Clause, fronted: float = 0.6) -> tuple[str, str]:
    """The clause as a sentence of both languages, its time or its place in front with some probability."""
    if clause.time and clause.time[1] not in BEFORE_VERB and dice.random() < fronted:
        return german_main(clause, "time"), english_clause(clause, "time")
    if clause.place and not clause.time and dice.random() < fronted:
        return german_main(clause, "place"), english_clause(clause)
    return german_main(clause), english_clause(clause)


def predicate(subject: Phrase, adjective: tuple[str, str], tense: str = "now") -> Clause:
    return Clause(subject, VERBS["sein"], tense, complement=Phrase(*adjective))


def pronoun(phrase: Phrase) -> Phrase:
    """What stands for the phrase the second time: er, sie, es. In English it goes by sex, with it for an animal."""
    english = {"m": "he", "f": "she", "p": "they"}.get(phrase.gender)
    if phrase.noun in ANIMALS and not phrase.plural:
        english = "it"
    return Phrase({"m": "er", "f": "sie", "n": "es", "p": "sie"}[phrase.gender], english, phrase.gender, phrase.noun)


IT = Phrase("es", "it", "n")
SUN, WIND = Phrase("die Sonne", "the sun", "f"), Phrase("der Wind", "the wind", "m")
BAD_WEATHER = (
    Clause(IT, VERBS["regnen"]),
    Clause(IT, VERBS["schneien"]),
    Clause(WIND, VERBS["wehen"]),
    predicate(IT, ("kalt", "cold")),
    predicate(IT, ("dunkel", "dark")),
)
GOOD_WEATHER = (Clause(SUN, VERBS["scheinen"]), predicate(IT, ("warm", "warm")))


def _within(actions: tuple[Action, ...], groups: str) -> tuple[Action, ...]:
    allowed = {place for group in groups.split() for place in PLACES[group]}
    narrowed = (action._replace(places=tuple(p for p in action.places if p in allowed)) for action in actions)
    return tuple(action for action in narrowed if action.places)


OUTDOORS = _within(LASTING + ANIMAL_HABITS, "out graze swim")
INDOORS = _within(LASTING, "home cook eat study")
GOALS = tuple(place for place in PLACES["walk"] if place.to)
FAR = tuple(place for place in GOALS if place.noun in _group("See Stadt Dorf Bahnhof Schule Strand Markt Wald"))
RUNS = tuple(place for place in PLACES["run"] if place.to)
WATERSIDE = tuple(place for place in GOALS if place.noun in _group("See Fluss Strand"))
ERRANDS = tuple(action for action in _within(LASTING, "walk") if "u" not in action.flags)
ERRANDS += tuple(action._replace(places=WATERSIDE) for action in _by_verb(DEEDS, "schwimmen"))
DOINGS = DEEDS + ANIMAL_DEEDS

# ----------------------------------------------------------------------------------------------------------- sentences
#
# Each returns the German and the English words without the capital letter and the full stop.


def simple_sentence(dice: Dice) -> tuple[str, str]:
    """Heute liest eine Frau im Park ein Buch: today a woman is reading a book in the park."""
    return both(dice, draw_clause(dice, DOINGS, places=0.65, times=NOW), fronted=0.45)


def past_sentence(dice: Dice) -> tuple[str, str]:
    """Gestern hat der Junge den Brief geschrieben: yesterday the boy wrote the letter."""
    actions = DOINGS if dice.chance(0.75) else LOSSES + FINDS
    return both(dice, draw_clause(dice, actions, "past", places=0.4, times=PAST), fronted=0.45)


def habit_sentence(dice: Dice) -> tuple[str, str]:
    """Jeden Tag räumt er das Zimmer auf: every day he cleans up the room. oft: often, before the verb in English."""
    return both(dice, draw_clause(dice, HABITS + ANIMAL_HABITS, "habit", places=0.5)._replace(time=dice.pick(HABIT)))


def modal_sentence(dice: Dice) -> tuple[str, str]:
    """Das Mädchen will morgen das Fenster putzen: the girl wants to clean the window tomorrow."""
    modal = dice.pick(tuple(MODALS))
    actions = WORK if modal == "must" else WISHES
    return both(dice, draw_clause(dice, actions, modal, places=0.4, times=SOON), fronted=0.4)


def liking_sentence(dice: Dice) -> tuple[str, str]:
    """Das Kind isst gern Äpfel: the child likes to eat apples. The German adverb is a verb in English."""
    action = dice.pick(PLEASURES)
    clause = draw_clause(dice, (action,), "gern", places=0.6)
    if action.objects:
        noun = dice.pick(action.objects)
        apples = _phrase("", "", _adjective(dice, noun, 0.2), noun, noun.plural != "-", "acc")
        clause = clause._replace(accusative=apples)
    clause = clause._replace(manner=("gern", ""))
    return german_main(clause), english_clause(clause)


def rising_sentence(dice: Dice) -> tuple[str, str]:
    """Der Bauer steht jeden Morgen auf, ist gestern in der Stadt angekommen: verbs with prefixes and no object."""
    draw = dice.random()
    tense, place = dice.pick(("now", "past", "habit")), None
    if draw < 0.5:
        morning = dice.chance(0.65)
        verb = dice.pick(("aufstehen", "aufwachen")) if morning else "einschlafen"
        nouns = PEOPLE if verb == "aufstehen" else PEOPLE + PETS
        times = {
            "now": NOW[1:],
            "past": (("heute Morgen", "this morning"),) if morning else (("gestern Abend", "yesterday evening"),),
            "habit": HABIT[1:2] if morning else HABIT[2:3],
        }[tense]
    elif draw < 0.8:
        verb, nouns, place = "ankommen", PEOPLE + _group("Bus Zug"), draw_place(dice, PLACES["arrive"])
        times = {"now": NOW + SOON[1:], "past": PAST, "habit": HABIT[:3]}[tense]
    else:
        verb, nouns = "zurückkommen", PEOPLE
        times = {"now": NOW + SOON[1:], "past": PAST, "habit": HABIT[:3]}[tense]
    if place and "Bahnhof" not in place.de:
        nouns = PEOPLE
    clause = Clause(draw_subject(dice, nouns), VERBS[verb], tense, place=place, time=dice.pick(times))
    return both(dice, clause, fronted=0.5)


def because_sentence(dice: Dice) -> tuple[str, str]:
    """Er weint, weil er den Ball verloren hat: a feeling and its reason, the verb last in the second clause."""
    draw = dice.random()
    if draw < 0.3:  # good cheer, from something one sees
        who = draw_subject(dice, PEOPLE)
        main = dice.pick(
            (Clause(who, VERBS["lachen"]), Clause(who, VERBS["lächeln"]), predicate(who, ("glücklich", "happy")))
        )
        reason = draw_clause(dice, CHEERFUL, places=0.4, other=who) if dice.chance(0.8) else dice.pick(GOOD_WEATHER)
    elif draw < 0.55:  # a loss
        who = draw_subject(dice, GENDERED)
        main = Clause(who, VERBS["weinen"]) if dice.chance(0.5) else predicate(who, ("traurig", "sad"))
        reason = draw_clause(dice, LOSSES, "past", subject=pronoun(who))
    elif draw < 0.75:  # work done
        action = dice.pick(TIRING)
        who = draw_subject(dice, tuple(noun for noun in action.doers if noun in GENDERED), adjectives=0.0)
        main = predicate(who, ("müde", "tired"))
        reason = draw_clause(dice, (action,), "past", places=0.6, subject=pronoun(who))
    else:  # the weather keeps people in
        main = draw_clause(dice, INDOORS, places=1.0)
        reason = dice.pick(BAD_WEATHER)
    return (
        f"{german_main(main)}, {german_subordinate('weil', reason)}",
        f"{english_clause(main)} because {english_clause(reason)}",
    )


def while_sentence(dice: Dice) -> tuple[str, str]:
    """Während die Frau kocht, schläft der Hund: while the woman is cooking, the dog is sleeping."""
    first = draw_clause(dice, LASTING + ANIMAL_DEEDS, places=0.3)
    second = draw_clause(dice, LASTING + ANIMAL_DEEDS, places=0.3, other=first.subject)
    german, english = german_subordinate("während", first), f"while {english_clause(first)}"
    if dice.chance(0.5):
        return f"{german}, {german_main(second, 'clause')}", f"{english}, {english_clause(second)}"
    return f"{german_main(second)}, {german}", f"{english_clause(second)} {english}"


def although_sentence(dice: Dice) -> tuple[str, str]:
    """Obwohl es regnet, spielt das Kind im Park: although it is raining, the child is playing in the park."""
    if dice.chance(0.6):
        main, reason = draw_clause(dice, OUTDOORS, places=1.0), dice.pick(BAD_WEATHER)
        if dice.chance(0.6):
            return (
                f"{german_subordinate('obwohl', reason)}, {german_main(main, 'clause')}",
                f"although {english_clause(reason)}, {english_clause(main)}",
            )
    else:
        action = dice.pick(TIRING)
        who = draw_subject(dice, tuple(noun for noun in action.doers if noun in GENDERED), adjectives=0.0)
        main = draw_clause(dice, (action,), places=0.6, subject=who)
        reason = predicate(pronoun(who), dice.pick((("müde", "tired"), ("hungrig", "hungry"), ("krank", "sick"))))
    return (
        f"{german_main(main)}, {german_subordinate('obwohl', reason)}",
        f"{english_clause(main)} although {english_clause(reason)}",
    )


def when_sentence(dice: Dice) -> tuple[str, str]:
    """Wenn die Sonne scheint, liest er im Garten: when the sun shines, he reads in the garden."""
    bad = dice.chance(0.5)
    condition = dice.pick(BAD_WEATHER if bad else GOOD_WEATHER)._replace(tense="habit")
    main = draw_clause(dice, INDOORS if bad else OUTDOORS, "habit", places=1.0)
    return (
        f"{german_subordinate('wenn', condition)}, {german_main(main, 'clause')}",
        f"when {english_clause(condition)}, {english_clause(main)}",
    )


def that_sentence(dice: Dice) -> tuple[str, str]:
    """Der Arzt sieht, dass die Kinder schlafen: the doctor sees that the children are sleeping."""
    main = Clause(draw_subject(dice, PEOPLE), VERBS[dice.pick(("sehen", "wissen", "glauben", "sagen"))])
    if dice.chance(0.6):
        what = draw_clause(dice, DOINGS, places=0.4, other=main.subject)
    else:
        what = draw_clause(dice, LOSSES + FINDS, "past", other=main.subject)
    return (
        f"{german_main(main)}, {german_subordinate('dass', what)}",
        f"{english_clause(main)} that {english_clause(what)}",
    )


TRANSITIVE = tuple(a for a in DEEDS if a.objects and a not in _by_verb(DEEDS, "schreiben malen bauen"))  # not yet alt


def relative_sentence(dice: Dice) -> tuple[str, str]:
    """Das Buch, das der Junge liest, ist alt: the book that the boy is reading is old."""
    if dice.chance(0.4):  # the subject: der Mann, der einen Hut trägt
        who = _phrase("der" if dice.chance(0.5) else "ein", "", ("", ""), dice.pick(PEOPLE), False, "nom")
        clothes = draw_object(dice, CLOTHES + DRESS * (who.noun in WOMEN), determiner="ein", adjectives=0.5)
        worn = Clause(who, VERBS["tragen:wear"], accusative=clothes)
        relative = german_subordinate(RELATIVES["nom", who.gender], worn, subject=False)
        who = who._replace(de=f"{who.de}, {relative},", en=f"{who.en} who {english_clause(worn, subject=False)}")
        action = dice.pick(DEEDS)
        while who.noun not in action.doers or action.verb in (VERBS["tragen:wear"], VERBS["schwimmen"]):
            action = dice.pick(DEEDS)
        main = draw_clause(dice, (action,), places=0.5, subject=who)
        return german_main(main), english_clause(main)
    action = dice.pick(TRANSITIVE)
    clause = draw_clause(dice, (action,), places=0.2)
    case, known = action.case, clause.dative or clause.accusative
    noun = known.noun
    thing = _phrase("der", "", ("", ""), noun, known.plural, "nom")
    relative = german_subordinate(RELATIVES[case, thing.gender], clause._replace(dative=None, accusative=None))
    pronoun_en = "who" if noun in PEOPLE else "that"
    english = f"{pronoun_en} {english_clause(clause._replace(dative=None, accusative=None))}"
    thing = thing._replace(de=f"{thing.de}, {relative},", en=f"{thing.en} {english}")
    main = predicate(thing, dice.pick(ADJECTIVES[noun.kind]))
    return german_main(main), english_clause(main)


def errand_sentence(dice: Dice) -> tuple[str, str]:
    """Sie geht in die Küche, um einen Kuchen zu backen: she is going into the kitchen to bake a cake."""
    action = dice.pick(ERRANDS)
    who = draw_subject(dice, action.doers)
    tense = dice.pick(("now", "now", "past"))
    going = Clause(who, VERBS["gehen"], tense, complement=draw_place(dice, action.places, goal=True))
    purpose = draw_clause(dice, (action,), places=0.0, subject=who)
    english = _join(["to", purpose.verb.base, *_english_rest(purpose)])
    return f"{german_main(going)}, {german_purpose(purpose)}", f"{english_clause(going)} {english}"


RIDES = (
    ("mit dem Bus", "by bus"),
    ("mit dem Zug", "by train"),
    ("mit dem Auto", "by car"),
    ("mit dem Fahrrad", "by bicycle"),
)


def going_sentence(dice: Dice) -> tuple[str, str]:
    """Er fährt mit dem Bus in die Stadt: he is going to the city by bus. Or: die Katze rennt ins Haus."""
    tense, times = dice.pick((("now", NOW), ("past", PAST), ("habit", HABIT), ("want", SOON)))
    draw = dice.random()
    if draw < 0.7:
        who, ride = draw_subject(dice, PEOPLE), draw < 0.4
        goal = draw_place(dice, FAR if ride else GOALS, goal=True)
        manner = dice.pick(RIDES) if ride else None
        clause = Clause(who, VERBS["fahren" if ride else "gehen"], tense, complement=goal, manner=manner)
    else:
        tense, times = ("past", PAST) if tense == "past" else ("now", NOW)
        who, goal = draw_subject(dice, ANIMALS[:3]), draw_place(dice, RUNS, goal=True)
        clause = Clause(who, VERBS["rennen"], tense, complement=goal)
    if tense == "habit" or dice.chance(0.6):
        clause = clause._replace(time=dice.pick(times))
    return both(dice, clause)


def there_sentence(dice: Dice) -> tuple[str, str]:
    """Auf dem Tisch liegen zwei Äpfel: there are two apples on the table."""
    place = draw_place(dice, PLACES["surface"])
    stands = dice.chance(0.5)
    noun = dice.pick(STANDING if stands else LYING)
    plural = dice.chance(0.45)
    thing = _phrase(dice.pick(COUNTED[2:]) if plural else "ein", "", _adjective(dice, noun, 0.45), noun, plural, "nom")
    clause = Clause(thing, VERBS["stehen" if stands else "liegen"], place=place)
    return german_main(clause, "place"), f"there {'are' if plural else 'is'} {thing.en} {place.en}"


PUTTING = (("stellen", STANDING, "surface"), ("legen", LYING, "surface"), ("tragen:carry", STANDING, "bring"))


def putting_sentence(dice: Dice) -> tuple[str, str]:
    """Der Koch stellt das Glas auf den Tisch, legt den Apfel auf den Tisch: both put in English."""
    verb, things, goals = dice.pick(PUTTING)
    who = draw_subject(dice, PEOPLE)
    thing, goal = draw_object(dice, things, "acc", who), draw_place(dice, PLACES[goals], goal=True)
    clause = Clause(who, VERBS[verb], dice.pick(("now", "past", "must")), None, thing, goal)
    return german_main(clause), english_clause(clause)


def giving_sentence(dice: Dice) -> tuple[str, str]:
    """Die Großmutter schenkt dem Kind ein Buch: the grandmother is giving the child a book."""
    who = draw_subject(dice, PEOPLE)
    receiver = draw_object(dice, PEOPLE, "dat", who, adjectives=0.15)
    verb = dice.pick(("geben", "schenken", "zeigen", "bringen", "erzählen"))
    if verb == "erzählen":
        thing = draw_object(dice, (NOUNS["Geschichte"],), determiner="ein", adjectives=0.6)
    else:
        things = GIFTS if verb == "schenken" else GIFTS + _group("Brief Schlüssel Zeitung")
        thing = draw_object(dice, things, determiner="ein", adjectives=0.4)
    clause = Clause(who, VERBS[verb], dice.pick(("now", "now", "past", "want")), receiver, thing)
    return german_main(clause), english_clause(clause)


def owning_sentence(dice: Dice) -> tuple[str, str]:
    """Das Auto gehört dem Nachbarn. Or: der Hund des Nachbarn ist alt: the neighbor's dog is old."""
    noun, plural = dice.pick(BELONGINGS), dice.chance(0.2)
    draw = dice.random()
    if draw < 0.35:
        thing = _phrase("der", "", _adjective(dice, noun, 0.5), noun, plural, "nom")
        clause = Clause(thing, VERBS["gehören"], dative=draw_object(dice, PEOPLE, "dat", adjectives=0.3))
    elif draw < 0.65:
        owner = dice.pick(PEOPLE)
        german = german_phrase("der", "", noun, plural, "nom") + " " + german_phrase("der", "", owner, False, "gen")
        english = f"the {owner.en}'s {noun.en_plural if plural else noun.en}"
        clause = predicate(Phrase(german, english, "p" if plural else noun.gender[0]), dice.pick(ADJECTIVES[noun.kind]))
    else:
        who = draw_subject(dice, PEOPLE)
        determiner = dice.pick(("ein", "kein"))
        thing = draw_object(dice, BELONGINGS, determiner=determiner, adjectives=0.6 * (determiner == "ein"))
        clause = Clause(who, VERBS["haben"], accusative=thing)
    return german_main(clause), english_clause(clause)


TOGETHER = (
    ("warten", "auf", "for", "acc", PEOPLE, _group("Bus Zug") + PEOPLE, "wait"),
    ("sprechen", "mit", "to", "dat", PEOPLE, PEOPLE, "out home"),
    ("spielen", "mit", "with", "dat", CHILDREN, _group("Ball") + PETS, "out home"),
)


def waiting_sentence(dice: Dice) -> tuple[str, str]:
    """Sie wartet auf den Bus, spricht mit dem Arzt, spielt mit dem Hund: the preposition belongs to the verb."""
    verb, german, english, case, doers, nouns, places = dice.pick(TOGETHER)
    who = draw_subject(dice, doers)
    thing = draw_object(dice, nouns, case, who)
    place = draw_place(dice, _places_of(places)) if dice.chance(0.5) else None
    complement = Phrase(f"{german} {thing.de}", f"{english} {thing.en}")
    clause = Clause(who, VERBS[verb], dice.pick(("now", "now", "past")), place=place, complement=complement)
    return both(dice, clause, fronted=0.3)


def and_sentence(dice: Dice) -> tuple[str, str]:
    """Der Hund schläft und die Katze spielt im Garten: the dog is sleeping and the cat is playing in the garden."""
    first = draw_clause(dice, LASTING + ANIMAL_DEEDS, places=0.35)
    second = draw_clause(dice, LASTING + ANIMAL_DEEDS, places=0.35, other=first.subject)
    return f"{german_main(first)} und {german_main(second)}", f"{english_clause(first)} and {english_clause(second)}"


SENTENCES: tuple[tuple[Callable[[Dice], tuple[str, str]], int], ...] = (
    (simple_sentence, 18),
    (past_sentence, 11),
    (habit_sentence, 8),
    (modal_sentence, 8),
    (liking_sentence, 4),
    (rising_sentence, 5),
    (because_sentence, 7),
    (while_sentence, 4),
    (although_sentence, 4),
    (when_sentence, 4),
    (that_sentence, 5),
    (relative_sentence, 6),
    (errand_sentence, 4),
    (going_sentence, 6),
    (there_sentence, 4),
    (putting_sentence, 3),
    (giving_sentence, 5),
    (owning_sentence, 5),
    (waiting_sentence, 4),
    (and_sentence, 2),
)
_DRAWN = tuple(sentence for sentence, weight in SENTENCES for _ in range(weight))


def _finish(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:].removesuffix(",") + "."


def draw_pair(dice: Dice) -> tuple[str, str]:
    """One sentence in German and in English.

    Returns:
        The two sentences, each with a capital letter, a full stop, and at most MAX_WORDS words.
    """
    while True:
        german, english = dice.pick(_DRAWN)(dice)
        if german.count(" ") < MAX_WORDS and english.count(" ") < MAX_WORDS:
            return _finish(german), _finish(english)


# --------------------------------------------------------------------------------------------------------------- files


def held_out_pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """`count` pairs in which no sentence of either language occurs twice."""
    dice, pairs, seen = Dice(seed), [], set()
    while len(pairs) < count:
        german, english = draw_pair(dice)
        if german not in seen and english not in seen:
            seen.update((german, english))
            pairs.append((german, english))
    return pairs


def train_pairs(seed: int, count: int, held_out: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """`count` pairs, one at a time, none of whose sentences is held out. The grammar is large, so few occur twice."""
    dice, seen = Dice(seed + 1), {sentence for pair in held_out for sentence in pair}
    while count:
        german, english = draw_pair(dice)
        if german not in seen and english not in seen:
            count -= 1
            yield german, english


def write_split(folder: Path, name: str, pairs: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    with (
        open(folder / f"{name}.de", "w", encoding="utf-8", newline="\n") as german_file,
        open(folder / f"{name}.en", "w", encoding="utf-8", newline="\n") as english_file,
    ):
        for german, english in pairs:
            german_file.write(german + "\n")
            english_file.write(english + "\n")


def write_corpus(folder: Path, pairs: int = TRAIN_PAIRS, held_out: int = HELD_OUT_PAIRS, seed: int = SEED) -> None:
    """Writes train, val and test, each .de and .en, into the folder.

    Args:
        pairs: training pairs.
        held_out: pairs of val, and of test.
        seed: the same seed gives the same bytes. Another gives another corpus of the same language.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = held_out_pairs(seed, 2 * held_out)
    write_split(folder, "val", held[:held_out])
    write_split(folder, "test", held[held_out:])
    write_split(folder, "train", train_pairs(seed, pairs, held))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write the German-English sample corpus.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pairs", type=int, default=TRAIN_PAIRS, help="training pairs")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_PAIRS, help="validation pairs, and test pairs")
    parser.add_argument("--seed", type=int, default=SEED, help="the same seed writes the same files")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write into")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.held_out < 1:
        parser.error("--pairs and --held-out must be at least 1")
    write_corpus(options.out, options.pairs, options.held_out, options.seed)


if __name__ == "__main__":
    main()
