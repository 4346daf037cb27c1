"""The text that an activation is checked on: prose, code and other languages, written for this purpose.

It is short, says things that any language model finds likely, and repeats nothing that could be copied.
"""

from __future__ import annotations

PASSAGES = (
    "The old lighthouse stood at the end of a narrow road, where the fields gave way to rock and the wind never"
    " stopped. In winter nobody went there but the keeper's daughter, who carried bread, oil and the letters that had"
    " come by the morning boat. She said that on clear nights you could see the lamps of three villages across the"
    " water, and count the ships that waited for the tide.",
    "Bread rises because yeast eats the sugar in the dough and gives off a gas. The gas is caught in small bubbles,"
    " and the dough grows until it is about twice as large. If the kitchen is cold, this takes longer, so many bakers"
    " leave the dough near the stove for an hour or two before they put it into the oven.",
    "def average(numbers):\n"
    '    """Return the mean of a list of numbers, or None if it is empty."""\n'
    "    if not numbers:\n"
    "        return None\n"
    "    total = 0\n"
    "    for number in numbers:\n"
    "        total += number\n"
    "    return total / len(numbers)\n\n\n"
    "print(average([2, 4, 9]))\n",
    "Le train est arrivé en retard, et nous avons attendu une heure dans le petit café de la gare. Quand il a commencé"
    " à pleuvoir, la serveuse a fermé les fenêtres et nous a apporté du pain et du fromage. Le soir, la mer était"
    " calme, et les enfants jouaient encore sur la plage.",
    "今天早上天气很好\uff0c我和妹妹一起去公园散步。湖边有很多人\uff0c有的在跑步\uff0c有的在下棋。"
    "我们买了两杯热茶\uff0c坐在树下看书\uff0c一直到中午才回家。下午下了一点小雨\uff0c我们就在家里做饭。",
)
