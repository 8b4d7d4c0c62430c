"use strict";
// Sorts and filters the queries of an evaluation. Without it all of them stand as written.
(() => {
  const list = document.getElementById("looks");
  const controls = document.getElementById("controls");
  if (!list || !controls) return;
  const [group, first, second, order] = controls.querySelectorAll("select");
  const words = controls.querySelector("input");
  const output = controls.querySelector("output");
  const looks = Array.from(list.children, (element, place) => ({
    element,
    place,
    group: element.dataset.group,
    values: element.dataset.values.split(" ").map((value) => (value === "-" ? NaN : Number(value))),
    text: element.textContent.toLowerCase(),
  }));
  const difference = (look) => look.values[first.value] - look.values[second.value];
  // What is shown, and by which number it is sorted; NaN is neither shown nor sorted.
  const orders = {
    written: [() => true, (look) => look.place],
    loss: [(look) => difference(look) < 0, difference],
    gain: [(look) => difference(look) > 0, (look) => -difference(look)],
    lowest: [(look) => !Number.isNaN(look.values[first.value]), (look) => look.values[first.value]],
  };
  const update = () => {
    const [isWanted, rank] = orders[order.value];
    const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = looks.filter(
      (look) =>
        isWanted(look) &&
        (group.value === "" || look.group === group.value) &&
        asked.every((word) => look.text.includes(word)),
    );
    shown.sort((a, b) => rank(a) - rank(b) || a.place - b.place);
    list.replaceChildren(...shown.map((look) => look.element));
    output.textContent = `${shown.length} of ${looks.length} queries`;
  };
  controls.hidden = false;
  controls.addEventListener("input", update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
