// Curves as SVG, and text that is coloured by surprise.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400, HEIGHT = 64, EDGE = 4;

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Draw lines of numbers (null: no point there) over the same steps, each to its own greatest, which
// is said beside the title.
export function draw(place, lines, title) {
  const highest = lines.map((line) => Math.max(...line.values.filter((x) => x !== null), 0));
  const steps = Math.max(...lines.map((line) => line.values.length), 2) - 1;
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const told = lines.map((line) => `${line.name} ${short(last(line.values))}`).join(", ");
  svg.setAttribute("aria-label", `${title}: ${told || "nothing yet"}`);
  lines.forEach((line, which) => {
    const high = highest[which] || 1;
    const points = line.values
      .map((value, n) => [n, value])
      .filter(([, value]) => value !== null)
      .map(([n, value]) => [
        EDGE + (n / steps) * (WIDTH - 2 * EDGE),
        HEIGHT - EDGE - (value / high) * (HEIGHT - 2 * EDGE),
      ]);
    const text = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    svg.append(shape("polyline", { points: text, class: line.kind }));
  });
  place.replaceChildren(svg);
  const caption = place.parentElement.querySelector("figcaption");
  caption.textContent = "";
  const [name, value] = [document.createElement("span"), document.createElement("span")];
  name.textContent = title;
  value.textContent = lines.some((line) => line.values.length)
    ? `at most ${highest.map(short).join(" and ")}`
    : "";
  caption.append(name, value);
}

export function short(x) {
  if (x === null || x === undefined) return "–";
  return x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1000) ? x.toFixed(2) : x.toExponential(1);
}

function last(values) {
  return values.length ? values[values.length - 1] : null;
}

// Tokens, each with its surprise in nats; six steps of colour, one for every 1.5 nats.
export function colour(place, words, surprise) {
  words.forEach((word, n) => {
    if (!word) return;
    const made = document.createElement("span");
    const nats = surprise[n];
    made.textContent = word;
    if (nats !== null) {
      const step = Math.min(6, Math.floor(nats / 1.5));
      if (step > 0) made.className = `s${step}`;
      made.title = `${nats.toFixed(2)} nats`;
    }
    place.append(made);
  });
}
