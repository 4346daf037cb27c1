"""Short questions of many kinds, for chats that the model writes itself: what a student never saw asked, it forgets."""

from __future__ import annotations

import numpy as np

# Each kind: ways to ask, and what about. Every way is used with every subject.
_KINDS = (
    (
        """
        What is the capital of {}?; What language do people speak in {}?; On which continent is {}?; What is
        {} famous for?; Tell me about {}.; What should I see in {}?; What do people eat in {}?; What is the
        climate of {} like?; Give me a short history of {}.; Which countries border {}?; How many people live
        in {}?; Plan a three-day trip to {}.
        """,
        """
        France; Italy; Spain; Germany; Japan; China; India; Brazil; Canada; Egypt; Greece; Russia; Mexico;
        Kenya; Norway; Sweden; Poland; Portugal; Turkey; Argentina; Australia; Austria; Ireland; Peru;
        Thailand; Vietnam; Cuba; Finland; Hungary; Nigeria; England; Scotland; Belgium; Switzerland; Denmark;
        Iceland; Morocco; South Africa; Ethiopia; Iran; Iraq; Pakistan; Indonesia; the Philippines; Chile;
        Colombia; Venezuela; Ukraine; Romania; Croatia; Israel; Saudi Arabia; Nepal; Mongolia; South Korea;
        New Zealand; Jamaica; the Netherlands; the United States
        """,
    ),
    (
        """
        What does a {} eat?; Where does a {} live?; How many legs does a {} have?; Tell me a fact about a {}.;
        How long does a {} live?; What sound does a {} make?; Write a short story about a {}.; Is a {} a
        mammal?; How does a {} protect itself?; Describe a {} to someone who has never seen one.
        """,
        """
        dog; cat; horse; cow; bee; spider; whale; dolphin; shark; penguin; frog; snake; lion; tiger; bear;
        wolf; rabbit; mouse; bat; butterfly; turtle; camel; giraffe; monkey; goat; sheep; pig; chicken; duck;
        crocodile; kangaroo; fox; deer; squirrel; owl; parrot; ant; crab; jellyfish; zebra; hippopotamus;
        beaver; hedgehog; snail; worm; seal; swan; donkey
        """,
    ),
    (
        """
        How do I make {}?; Give me a simple recipe for {}.; What goes well with {}?; Is {} healthy?; Where does
        {} come from?; How can I make {} taste better?; What ingredients do I need for {}?
        """,
        """
        bread; vegetable soup; fried rice; apple pie; salad; pizza; pasta; chicken curry; lemonade; hummus; tea;
        coffee; chocolate cake; tomato sauce; potato salad; lentil soup; roast chicken; grilled fish; ice
        cream; yoghurt; cheese; jam; oatmeal; guacamole; risotto; chili; banana bread; onion soup; stew; popcorn
        """,
    ),
    (
        """
        What is {}?; How does {} work?; Explain {} to a child.; Why is {} important?; Give me three facts about
        {}.; Explain {} in one paragraph.; What are the advantages and disadvantages of {}?; Who discovered or
        invented {}?; Write a short essay about {}.; What do most people get wrong about {}?; How has {}
        changed the world?; Give me an example of {}.; What can we learn from {}?; Write three quiz questions
        about {}.
        """,
        """
        the bicycle; the telescope; a battery; the steam engine; the computer; the internet; photography; the
        compass; a bridge; flight; magnetism; solar power; a vaccine; a rainbow; an earthquake; a volcano;
        gravity; photosynthesis; the water cycle; the moon; the sun; a black hole; the cell; DNA; the heart;
        the brain; a virus; money; a bank; democracy; inflation; an atom; electricity; sound; light; lightning;
        a desert; the rain forest; the ocean; evolution; natural selection; the immune system; climate change;
        recycling; nuclear power; wind energy; artificial intelligence; machine learning; a database; an
        algorithm; encryption; the stock market; insurance; a budget; supply and demand; globalization; the
        Renaissance; the Industrial Revolution; the French Revolution; the Roman Empire; the Cold War; the
        printing press; writing; mathematics; geometry; algebra; probability; statistics; the scientific
        method; philosophy; ethics; logic; psychology; memory; sleep; dreaming; exercise; nutrition; vitamin C;
        blood; the skeleton; digestion; the lung; music; painting; poetry; the theatre; cinema; architecture; sport;
        football; chess; the Olympic Games; education; a university; a library; a hospital; a museum; a city;
        farming; the wheel; glass; paper; plastic; steel; concrete; the calendar; time; the solar system; a
        galaxy; the speed of light; relativity; an acid; a chemical reaction; water; oxygen; carbon; gold;
        friendship; leadership; creativity; teamwork; public speaking; meditation; a good habit; stress
        """,
    ),
    (
        """
        Who was {}?; What is {} known for?; When was {} born?; Where did {} live?; Write a short biography of
        {}.; What would {} say about the world of today?; What can we learn from {}?; Tell me something
        surprising about {}.
        """,
        """
        William Shakespeare; Albert Einstein; Isaac Newton; Marie Curie; Leonardo da Vinci; Mozart; Beethoven;
        Abraham Lincoln; Napoleon; Cleopatra; Julius Caesar; Charles Darwin; Galileo; Aristotle; Gandhi;
        Nelson Mandela; Vincent van Gogh; Jane Austen; Mark Twain; Homer; Thomas Edison; Nikola Tesla;
        Christopher Columbus; Neil Armstrong; George Washington; Plato; Socrates; Michelangelo; Pablo Picasso;
        Frida Kahlo; Martin Luther King; Queen Victoria; Alexander the Great; Confucius; Ada Lovelace; Alan
        Turing; Louis Pasteur; Florence Nightingale; Bach; Charles Dickens; Anne Frank; Rosa Parks; Amelia
        Earhart; Marco Polo; Archimedes; Euclid
        """,
    ),
    (
        """
        Who wrote {}?; What is {} about?; Who is the main character of {}?; Why should I read {}?; Summarize {}.
        """,
        """
        Romeo and Juliet; Hamlet; Pride and Prejudice; the Odyssey; Don Quixote; War and Peace; Oliver Twist;
        Moby Dick; Frankenstein; Dracula; Alice in Wonderland; Macbeth; the Iliad; Robinson Crusoe; Gulliver's
        Travels; Treasure Island; Jane Eyre; Great Expectations; Crime and Punishment; The Time Machine; The
        Jungle Book; Peter Pan; The Little Prince; Animal Farm; Cinderella; Little Red Riding Hood
        """,
    ),
    (
        """
        What is the chemical formula of {}?; What is {} used for?; Where is {} found?; Is {} dangerous?
        """,
        """
        water; salt; carbon dioxide; oxygen; gold; iron; silver; sugar; methane; hydrogen; helium; nitrogen;
        copper; aluminium; sulphuric acid; ammonia; alcohol; lead; mercury; chlorine
        """,
    ),
    (
        """
        What is the opposite of {}?; Give me a synonym for {}.; Use the word {} in a sentence.; What does the
        word {} mean?; Which words rhyme with {}?
        """,
        """
        happy; sad; big; small; fast; slow; good; hot; old; brave; clever; tired; quiet; bright; strong; rich;
        easy; beautiful; angry; honest; empty; early; gentle; sharp; careful; famous; strange; simple
        """,
    ),
    (
        """
        Write a short poem about {}.; Write a short story about {}.; Describe {} in three sentences.; Write the
        first paragraph of a novel about {}.; Give me five titles for a book about {}.; Write a dialogue about
        {}.; Write a haiku about {}.; Write a letter to a friend about {}.
        """,
        """
        the sea; autumn; a cat; friendship; the city at night; a lost key; a journey by train; a rainy day; a
        garden; a robot; a brave mouse; an old house; a dragon; winter; a storm; a birthday; the first day at
        school; a lighthouse; a mysterious letter; a magic tree; two sisters; a detective; a spaceship; an
        island; a market; the mountains; a river; a wedding; a dream; a clock; a lonely king; a painter; a
        soldier who comes home; spring; the stars; a small village; a talking dog; a long walk; a secret door
        """,
    ),
    (
        """
        How do I {}?; Give me three tips to {}.; I want to {}. Where should I start?; What is the best way to
        {}?; Why is it hard to {}?; Make a plan for me to {}.; What mistakes should I avoid when I {}?; How long
        does it take to {}?; Write a short blog post about how to {}.
        """,
        """
        learn a language; sleep better; save money; study for an exam; write a letter; cook rice; stay
        healthy; plant tomatoes; make friends; prepare for a job interview; start a business; be more patient;
        boil an egg; remember names; play chess; manage my time; reduce stress; lose weight; run a marathon;
        write a book; learn to swim; paint a room; fix a bicycle; clean a kitchen; choose a computer; buy a
        house; move to another city; train a dog; care for a cat; grow herbs; bake a cake; take good photos;
        give a speech; write a resume; ask for a raise; learn the guitar; draw a face; meditate; stop smoking;
        drink less coffee; read more books; organize a party; plan a holiday; pack a suitcase; learn to
        program; build a website; protect my password; back up my files; improve my handwriting; learn
        mathematics; teach children; apologize to a friend; deal with anger; work from home; wake up early;
        spend less time on my phone; keep a diary; save energy; recycle at home; make a budget
        """,
    ),
    (
        """
        Write a Python function that {}.; How do I write a program that {}?; Write JavaScript code that {}.;
        Explain step by step how a program {}.
        """,
        """
        reverses a string; adds two numbers; finds the largest number in a list; sorts a list; checks whether
        a number is prime; counts the words in a text; computes a factorial; removes duplicates from a list;
        reads a file; converts Celsius to Fahrenheit; counts vowels; prints the Fibonacci numbers; checks
        whether a word is a palindrome; computes the average of a list; merges two lists; generates a random
        password; downloads a web page; parses JSON; finds the greatest common divisor; rolls two dice; draws
        a triangle of stars; searches a sorted list; multiplies two matrices; counts letters; splits a sentence
        into words; computes the area of a circle; writes a file; plays rock, paper, scissors
        """,
    ),
    (
        """
        What is the difference between {}?; Compare {}.; Explain {} and when each of them matters.
        """,
        """
        a virus and a bacterium; weather and climate; a planet and a star; speed and velocity; coffee and tea;
        a list and a tuple in Python; mass and weight; a fruit and a vegetable; a crocodile and an alligator; a
        lake and a sea; a novel and a short story; a debit card and a credit card; RAM and storage; HTTP and
        HTTPS; a frog and a toad; a comet and an asteroid; butter and margarine; an opinion and a fact; a simile
        and a metaphor; a city and a village; renting and buying; cats and dogs; trains and planes; a violin and
        a guitar; an interview and a conversation; a leader and a manager; mean and median; a class and an
        object; empathy and sympathy; a republic and a monarchy
        """,
    ),
    (
        """
        Translate into French: {}; Translate into Spanish: {}; Translate into German: {}; Rewrite politely: {};
        Is this sentence correct? {}; Rewrite in the past tense: {}; Continue the story: {}; Make it longer: {}
        """,
        """
        The weather is nice today.; Where is the station?; My name is Anna.; Good morning, my friend.; I am
        hungry and I want to eat.; The children play in the garden.; We need to leave now.; She reads a book
        every week.; He does not know the answer.; The old man walks slowly to the river.; Send me the report
        today.; The train is late again.; There is a light in the window.; My sister works in a hospital.; It is
        raining, so we stay at home.; The dog sees a cat and runs.; Close the door.; They are building a bridge.
        """,
    ),
    (
        """
        What is {}?; Calculate {}.; How much is {}? Explain the steps.
        """,
        """
        2 plus 2; 3 plus 5; 7 minus 4; 6 times 7; 10 minus 3; 12 times 4; 9 plus 8; 15 plus 6; 20 minus 11; 5
        times 5; half of 30; 17 times 23; a quarter of 100; 8 plus 13; 3 times 9; 10 percent of 250; 20 percent
        of 80; 144 divided by 12; 7 squared; the square root of 81; 100 minus 37; 45 plus 55; 3 times 4 plus 2;
        1000 divided by 8; 11 times 11; a third of 90; 2 to the power of 8; 63 divided by 9; 25 plus 17; 81
        minus 29; 14 times 6; the sum of 1, 2, 3 and 4; the area of a square with side 5
        """,
    ),
    (
        """
        List five {}.; Name three {} and describe each.; What are the most famous {}?; Recommend some {} to me
        and say why.; Which {} are good for beginners?
        """,
        """
        rivers; mountains; painters; inventions; musical instruments; sports; board games; trees; flowers;
        vegetables; healthy breakfasts; programming languages; science fiction books; films about friendship;
        ways to relax; jobs for people who like animals; European cities; islands; planets; dances; hobbies;
        museums; philosophers; scientists; composers; folk tales; birds; desserts; ways to learn vocabulary;
        gifts for a friend; questions for an interview; reasons to travel; uses of a brick; kitchen tools
        """,
    ),
    (
        """
        Write an email to {}.; Write a polite message to {}.; What should I say to {}?; Help me write a note to
        {}.
        """,
        """
        my teacher, because I am ill; my boss to ask for a day off; a customer who is unhappy; my landlord about
        a broken heater; a friend who moved away; a colleague to thank her; a company to ask for a job; my
        neighbours about a party; a shop to return a pair of shoes; my team about a new meeting; a friend who
        lost his dog; my grandmother for her birthday; a hotel to book a room; the school about my child
        """,
    ),
    (
        """
        I feel {}. What can I do?; Why do I feel {}?; My friend feels {}. How can I help?; Write something kind
        for somebody who feels {}.
        """,
        """
        sad; lonely; tired; nervous; angry; bored; stressed; lost; jealous; unmotivated; afraid of the future;
        shy; overwhelmed; homesick; guilty
        """,
    ),
    (
        """
        {}; {} Answer in one sentence.; {} Explain.
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
        me a joke.; I am sad.; I am bored.; Can you help me?; What is your name?; Why is the sky blue?; Why do
        leaves fall in autumn?; Why do we yawn?; Why is the sea salty?; Why do cats purr?; How do birds fly?;
        How do fish breathe?; How do plants drink?; What makes thunder?; What is the smallest country?; What is
        the longest river?; Who wrote the first novel?; Which animal is the fastest?; How far away is the moon?;
        How many bones does a human have?; What is the hardest natural material?; How many players are in a
        football team?; What is the boiling point of water in Fahrenheit?; How many letters are in the
        alphabet?; Which metal is liquid?; What do you call a young dog?; What is the meaning of life?; Are you
        a human?; What time is it?; Good night!; Tell me something interesting.; Give me some advice.; What
        should I cook tonight?; What should I read next?; How was your day?; I do not understand.; Say it again
        in other words.; Can you speak French?; What is your favourite colour?; Let us play a game.; Ask me a
        question.; Tell me a riddle.; Is it going to rain tomorrow?; What is two and two?; Who is the president?
        """,
    ),
)


def questions(seed: int) -> list[str]:
    """All of them, some thousands, in an order of the seed's."""
    kinds = [(_parts(asks), _parts(subjects)) for asks, subjects in _KINDS]
    found = list(dict.fromkeys(ask.format(about) for asks, subjects in kinds for about in subjects for ask in asks))
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _parts(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]
