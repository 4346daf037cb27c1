"""Short questions of many kinds, for chats that the model writes itself: what a student never saw asked, it forgets."""

from __future__ import annotations

import numpy as np

# Each kind: ways to ask, and what about. Every way is used with every subject.
_KINDS = (
    (
        """
        What is the capital of {}?; What language do people speak in {}?; On which continent is {}?; What is
        {} famous for?; Tell me about {}.
        """,
        """
        France; Italy; Spain; Germany; Japan; China; India; Brazil; Canada; Egypt; Greece; Russia; Mexico;
        Kenya; Norway; Sweden; Poland; Portugal; Turkey; Argentina; Australia; Austria; Ireland; Peru;
        Thailand; Vietnam; Cuba; Finland; Hungary; Nigeria; England
        """,
    ),
    (
        """
        What does a {} eat?; Where does a {} live?; How many legs does a {} have?; Tell me a fact about a {}.
        """,
        """
        dog; cat; horse; cow; bee; spider; whale; dolphin; shark; penguin; frog; snake; lion; tiger; bear;
        wolf; rabbit; mouse; bat; butterfly; turtle; camel; giraffe
        """,
    ),
    (
        """
        How do I make {}?; Give me a simple recipe for {}.
        """,
        """
        bread; vegetable soup; pancakes; tomato sauce; fried rice; an omelette; apple pie; a salad; pizza;
        pasta; chicken curry; lemonade; mashed potatoes; hummus; scrambled eggs; tea
        """,
    ),
    (
        """
        What is {}?; How does {} work?; Explain {} to a child.; Why is {} important?
        """,
        """
        a bicycle; a telescope; a battery; an engine; a computer; the internet; a camera; a compass; a bridge;
        an aeroplane; a magnet; a solar panel; a vaccine; a rainbow; an earthquake; a volcano; gravity;
        photosynthesis; the water cycle; the moon; the sun; a black hole; a cell; DNA; the heart; the brain; a
        virus; money; a bank; democracy; inflation; an atom; electricity; sound; light; lightning; a desert; a
        forest; an ocean
        """,
    ),
    (
        """
        Who was {}?; What is {} known for?; When was {} born?
        """,
        """
        William Shakespeare; Albert Einstein; Isaac Newton; Marie Curie; Leonardo da Vinci; Mozart; Beethoven;
        Abraham Lincoln; Napoleon; Cleopatra; Julius Caesar; Charles Darwin; Galileo; Aristotle; Gandhi;
        Nelson Mandela; Vincent van Gogh; Jane Austen; Mark Twain; Homer; Thomas Edison; Nikola Tesla;
        Christopher Columbus; Neil Armstrong; George Washington
        """,
    ),
    (
        """
        Who wrote {}?; What is {} about?
        """,
        """
        Romeo and Juliet; Hamlet; Pride and Prejudice; the Odyssey; Don Quixote; War and Peace; Oliver Twist;
        Moby Dick; Frankenstein; Dracula; Alice in Wonderland; Macbeth
        """,
    ),
    (
        """
        What is the chemical formula of {}?; What is {} used for?
        """,
        """
        water; salt; carbon dioxide; oxygen; gold; iron; silver; sugar; methane; hydrogen
        """,
    ),
    (
        """
        What is the opposite of {}?; Give me a synonym for {}.; Use the word {} in a sentence.
        """,
        """
        happy; sad; big; small; fast; slow; good; hot; old; brave; clever; tired; quiet
        """,
    ),
    (
        """
        Write a short poem about {}.; Write a short story about {}.; Describe {} in three sentences.
        """,
        """
        the sea; autumn; a cat; friendship; the city at night; a lost key; a journey by train; a rainy day; a
        garden; a robot; a brave mouse; an old house; a dragon; winter; a storm
        """,
    ),
    (
        """
        How do I {}?; Give me three tips to {}.
        """,
        """
        learn a language; sleep better; save money; study for an exam; write a letter; cook rice; stay
        healthy; plant tomatoes; make friends; prepare for a job interview; start a business; be more patient;
        boil an egg; remember names; play chess; manage my time; reduce stress
        """,
    ),
    (
        """
        Write a Python function that {}.; How do I write a program that {}?
        """,
        """
        reverses a string; adds two numbers; finds the largest number in a list; sorts a list; checks whether
        a number is prime; counts the words in a text; computes a factorial; removes duplicates from a list;
        reads a file; converts Celsius to Fahrenheit; counts vowels
        """,
    ),
    (
        """
        What is the difference between {}?; Compare {}.
        """,
        """
        a virus and a bacterium; weather and climate; a planet and a star; speed and velocity; coffee and tea;
        a list and a tuple in Python; mass and weight; a fruit and a vegetable
        """,
    ),
    (
        """
        Translate into French: {}; Translate into Spanish: {}; Translate into German: {}
        """,
        """
        The weather is nice today.; Where is the station?; My name is Anna.; Good morning, my friend.
        """,
    ),
    (
        """
        What is {}?; Calculate {}.
        """,
        """
        2 plus 2; 3 plus 5; 7 minus 4; 6 times 7; 10 minus 3; 12 times 4; 9 plus 8; 15 plus 6; 20 minus 11; 5
        times 5; half of 30; 17 times 23; a quarter of 100; 8 plus 13; 3 times 9
        """,
    ),
    (
        """
        {}; {} Answer in one sentence.
        """,
        """
        How many days are in a week?; How many months are in a year?; How many hours are in a day?; How many
        minutes are in an hour?; What colour is the sky?; What colour is grass?; Is the sun hot or cold?; Is
        ice hot or cold?; What do bees make?; What do cows give us?; What is the largest planet?; What is the
        largest ocean?; What is the tallest mountain?; How many continents are there?; Which planet is closest
        to the sun?; What is the speed of light?; At what temperature does water boil?; At what temperature
        does water freeze?; Name three primary colours.; Name three fruits.; Name the seasons.; Name the days
        of the week.; What comes after Monday?; Count from one to ten.; Who painted the Mona Lisa?; Who
        invented the telephone?; Who was the first man on the moon?; When did the Second World War end?; What
        is the currency of Japan?; Hello!; Hi, how are you?; Who are you?; What can you do?; Thank you!; Tell
        me a joke.; I am sad.; I am bored.; Can you help me?; What is your name?
        """,
    ),
)


def questions(seed: int) -> list[str]:
    """All of them, some hundreds, in an order of the seed's."""
    kinds = [(_parts(asks), _parts(subjects)) for asks, subjects in _KINDS]
    found = [ask.format(about) for asks, subjects in kinds for about in subjects for ask in asks]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _parts(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]
