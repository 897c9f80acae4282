"""The words of the demo dialogues: what may fill a slot, and the sentences with slots.

Plain ASCII, no abbreviations with a full stop, since the synthesiser would end a sentence there.
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """Something said early in a dialogue that comes back later."""

    tell: str  # the user says it
    ack: str  # the main speaker takes it up
    ask: str  # the user asks for it, minutes later
    answer: str  # the main speaker remembers
    recap: str  # a clause for the closing summary


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SLOTS: dict[str, tuple[str, ...]] = {
    "name": _words(
        "Anna Peter Maria Thomas Laura Daniel Sophie Martin Clara Simon Helen Oscar Julia Victor Emma Robert "
        "Alice Felix Nora Hugo Irene Samuel Diana Edgar"
    ),
    "friend": _words(
        "Lucas Marta George Paula Henry Olga Kevin Ruth Walter Sandra Dennis Monica Philip Teresa Arthur "
        "Gloria Marcus Vera"
    ),
    "city": _words(
        "London Paris Madrid Vienna Lisbon Dublin Boston Chicago Toronto Sydney Oslo Prague Geneva Berlin "
        "Athens Helsinki Seattle Denver"
    ),
    "animal": ("dog", "cat", "parrot", "rabbit", "pony", "hamster", "turtle", "goldfish"),
    "pet": _words("Biscuit Shadow Pepper Misty Rocky Honey Ginger Bandit Pickle Velvet Domino Muffin"),
    "colour": ("red", "green", "purple", "yellow", "orange", "dark blue", "silver", "white", "brown"),
    "job": (
        "a nurse",
        "a carpenter",
        "a teacher",
        "a lawyer",
        "a baker",
        "an engineer",
        "a gardener",
        "a journalist",
        "a dentist",
        "a bus driver",
        "a librarian",
        "an architect",
    ),
    "instrument": ("violin", "piano", "guitar", "trumpet", "cello", "flute", "harp", "drums"),
    "dish": (
        "mushroom soup",
        "apple pie",
        "fried rice",
        "tomato salad",
        "roast chicken",
        "potato pancakes",
        "lemon cake",
        "fish stew",
        "bean curry",
        "onion tart",
    ),
    "ingredient": ("garlic", "butter", "pepper", "cream", "basil", "ginger", "cheese", "vinegar", "honey"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "March", "April", "June", "July", "August", "October", "November"),
    "day": ("first", "second", "fifth", "ninth", "twelfth", "fourteenth", "twentieth", "twenty-third"),
    "time": (
        "6:15",
        "7:30",
        "8:45",
        "9:20",
        "10:10",
        "11:40",
        "half past two",
        "a quarter past four",
        "noon",
    ),
    "room": _words("12 17 25 38 41 56 63 104 118 207 219 312 330 415"),
    "number": (
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "eleven",
        "fourteen",
        "nineteen",
        "twenty-two",
        "thirty-five",
        "forty",
    ),
    "place": ("museum", "harbour", "old castle", "market", "botanical garden", "theatre", "lake", "zoo"),
    "cafe": ("Blue Lantern", "Silver Spoon", "Copper Kettle", "Golden Fox", "Quiet Corner", "Red Anchor"),
    "street": ("Mill Street", "Park Lane", "Station Road", "Bridge Street", "Church Hill", "River Walk"),
    "weather": ("rainy", "sunny", "windy", "foggy", "cold", "cloudy", "stormy", "mild"),
    "sport": ("tennis", "football", "swimming", "chess", "running", "basketball", "rowing", "cycling"),
    "book": (
        "a story about pirates",
        "a novel about two sisters",
        "a history of the railways",
        "a detective story",
        "a book about whales",
        "a collection of poems",
    ),
    "feeling": (
        "wonderful",
        "exciting",
        "relaxing",
        "difficult",
        "expensive",
        "surprising",
        "lovely",
        "noisy",
    ),
    "thing": ("bicycle", "laptop", "coat", "camera", "lamp", "suitcase", "umbrella", "radio", "sofa"),
}

OPENINGS: tuple[tuple[str, ...], ...] = (
    (
        "Hello, this is Moshi. Who am I speaking to?",
        "Hi Moshi, my name is {name}.",
        "Nice to meet you, {name}.",
    ),
    ("Good morning, Moshi here. What is your name?", "Good morning. I am {name}.", "Welcome, {name}."),
    ("Hey, how are you today?", "I'm fine, thanks. I'm {name}, by the way.", "Great to hear that, {name}."),
    (
        "Hello there, I am Moshi. And you are?",
        "I'm {name}. It's a {weather} day here.",
        "Well, hello {name}.",
    ),
)

FACTS: tuple[Fact, ...] = (
    Fact(
        "I have a {animal} called {pet}.",
        "{pet} is a lovely name for a {animal}.",
        "Do you remember what my {animal} is called?",
        "Of course, your {animal} is called {pet}.",
        "your {animal} is called {pet}",
    ),
    Fact(
        "Last year I moved to {city}.",
        "Oh, {city}! I have heard that it is {feeling}.",
        "Which city did I tell you about?",
        "You told me that you moved to {city}.",
        "you live in {city}",
    ),
    Fact(
        "I work as {job}.",
        "Being {job} must be {feeling} at times.",
        "Can you tell me what my job is?",
        "You work as {job}.",
        "you are {job}",
    ),
    Fact(
        "My favourite colour is {colour}.",
        "Then your {thing} should be {colour} too.",
        "What colour do I like best?",
        "You like {colour} best.",
        "you like {colour}",
    ),
    Fact(
        "My friend {friend} plays the {instrument}.",
        "Please tell {friend} that I love the {instrument}.",
        "Who was it that plays the {instrument}?",
        "It was your friend {friend}.",
        "{friend} plays the {instrument}",
    ),
    Fact(
        "My train leaves at {time} on {weekday}.",
        "I'll remember that: {weekday} at {time}.",
        "When does my train leave?",
        "Your train leaves on {weekday} at {time}.",
        "the train leaves on {weekday} at {time}",
    ),
    Fact(
        "The hotel gave me room {room}.",
        "Room {room}, I hope that it is quiet.",
        "I forgot the number of my room. What was it?",
        "It was room {room}.",
        "your room is number {room}",
    ),
    Fact(
        "My birthday is on the {day} of {month}.",
        "The {day} of {month}, that is a good day for a party.",
        "When is my birthday?",
        "Your birthday is on the {day} of {month}.",
        "your birthday is on the {day} of {month}",
    ),
    Fact(
        "Can you suggest a cafe for the weekend?",
        "Try the {cafe} on {street}, it is {feeling}.",
        "What was the name of that cafe?",
        "That was the {cafe} on {street}.",
        "you want to try the {cafe} on {street}",
    ),
    Fact(
        "For dinner I am going to cook {dish}.",
        "Good choice. Use a lot of {ingredient} for the {dish}.",
        "What did I want to cook tonight?",
        "You wanted to cook {dish} with {ingredient}.",
        "there is {dish} for dinner",
    ),
    Fact(
        "I bought {number} tickets for the {place}.",
        "So you will be {number} people at the {place}.",
        "How many tickets did I buy?",
        "You bought {number} tickets for the {place}.",
        "you have {number} tickets for the {place}",
    ),
    Fact(
        "I'm reading {book} at the moment.",
        "I like the sound of {book}.",
        "What is it that I'm reading?",
        "You are reading {book}.",
        "you are reading {book}",
    ),
)

TOPICS: tuple[tuple[str, ...], ...] = (
    (
        "What's the weather like where you are?",
        "It is {weather} today, but {weekday} should be better.",
        "Then let's go to the {place} on {weekday}.",
        "Good idea, I've never been to the {place}.",
    ),
    (
        "Do you like {sport}?",
        "I can't play it, but I enjoy listening to stories about {sport}.",
        "We lost by {number} points last {weekday}.",
        "Don't worry, you'll win the next game.",
    ),
    (
        "How do I make {dish}?",
        "You need {ingredient}, and about {number} minutes of patience.",
        "Is that all? No {ingredient}?",
        "Well, a little {ingredient} never hurts.",
    ),
    (
        "I'd like to learn the {instrument}.",
        "That takes practice. Do you have a teacher?",
        "{friend} could teach me.",
        "Then ask {friend} before {month}.",
    ),
    (
        "Yesterday I lost my {colour} {thing}.",
        "I'm sorry. Where did you see it last?",
        "I think I left it on the bus near {street}.",
        "You should call the bus company in the morning.",
    ),
    (
        "Have you ever been to {city}?",
        "No, but people say that {city} is {feeling} in {month}.",
        "The flight takes {number} hours, doesn't it?",
        "I think so, and then there's the train.",
    ),
    (
        "I'm looking for a present for {friend}.",
        "What about {book}?",
        "That is a {feeling} idea, thank you.",
        "You're welcome. Wrap it in {colour} paper.",
    ),
    (
        "My neighbour has {number} chickens.",
        "That must be {feeling} in the morning!",
        "They wake me up at {time} every day.",
        "At least you have fresh eggs for breakfast.",
    ),
    (
        "Our meeting was moved to {time}.",
        "Will {friend} still be able to come?",
        "Yes, but only for {number} minutes.",
        "Then let's talk about the {place} first.",
    ),
    (
        "I want to paint the kitchen {colour}.",
        "With a {colour} wall the room will look {feeling}.",
        "How much paint do I need?",
        "I'd say {number} litres, if you paint it twice.",
    ),
    (
        "Is the {place} open on {weekday}?",
        "It opens at {time}, and the entrance is on {street}.",
        "How much does it cost?",
        "It's {number} pounds for adults, and children are free.",
    ),
    (
        "I couldn't sleep last night.",
        "Was it the {weather} weather, or did you drink coffee?",
        "Both, I'm afraid. I had {number} cups.",
        "Tonight, try {book} and a cup of tea instead.",
    ),
)

LEADS: tuple[str, ...] = (
    "",
    "",
    "",
    "By the way, ",
    "So, ",
    "You know, ",
    "Well, ",
    "Let me ask you something. ",
)
RECALL_LEADS: tuple[str, ...] = ("", "", "Wait a moment. ", "Let's see if you were listening. ", "Tell me, ")
ANSWER_TAILS: tuple[str, ...] = (
    "",
    "",
    "",
    " Did I get that right?",
    " I'm quite sure, {name}.",
    " See, I was listening.",
)
BACKCHANNELS: tuple[str, ...] = ("Right.", "I see.", "Okay.", "Really?", "Yes.", "Sure.")
CLOSINGS: tuple[tuple[str, ...], ...] = (
    ("I have to go now, Moshi.", "So, to sum up, {recap}. Goodbye, {name}!"),
    ("Thank you for the talk.", "It was a pleasure. I'll remember that {recap}. Take care, {name}."),
    ("That's all for today.", "Before you go, {name}: {recap}. See you soon!"),
)
