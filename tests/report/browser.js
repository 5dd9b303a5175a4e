// What a person sees of a page, measured: each function returns a list of complaints, empty where all is well.
"use strict";
window.look = (() => {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  // Any colour of CSS as [r, g, b, a]
  function rgba(colour) {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = colour;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  const over = ([r, g, b, a], under) => [r, g, b].map((part, i) => part * a + under[i] * (1 - a));
  function luminance(rgb) {
    const [r, g, b] = rgb.slice(0, 3).map((part) => part / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function ratio(one, other) {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }
  const path = (element) => {
    const parts = [];
    for (let one = element; one && one !== document.body; one = one.parentElement) {
      const place = one.parentElement ? [...one.parentElement.children].indexOf(one) : 0;
      parts.unshift(one.id ? `${one.localName}#${one.id}` : `${one.localName}:${place}`);
      if (one.id) break;
    }
    return parts.join(">");
  };
  const seen = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true, contentVisibilityAuto: true });
  const inside = (box, x, y) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;

  // What is painted behind an element: backgrounds of HTML, then filled shapes of the same picture that were drawn before
  function behind(element) {
    let colour = [255, 255, 255];
    const around = [];
    for (let one = element; one; one = one.parentElement) around.unshift(one);
    for (const one of around) colour = over(rgba(getComputedStyle(one).backgroundColor), colour);
    const picture = element.closest("svg");
    if (!picture) return colour;
    const box = element.getBoundingClientRect();
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    for (const shape of picture.querySelectorAll("rect, circle, path, polygon")) {
      const before = shape.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING;
      const { fill, fillOpacity } = getComputedStyle(shape);
      if (!before || fill === "none" || !inside(shape.getBoundingClientRect(), x, y)) continue;
      const [r, g, b, a] = rgba(fill);
      colour = over([r, g, b, a * fillOpacity], colour);
    }
    return colour;
  }

  // WCAG 2 AA: 4.5 : 1, and 3 : 1 for large letters
  function contrast() {
    const found = new Map();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode()) {
      const element = text.parentElement;
      if (!text.data.trim() || !element.getClientRects().length || !seen(element)) continue;
      if (element.closest("title, desc, script, style")) continue;
      const style = getComputedStyle(element);
      let opacity = 1;
      for (let one = element; one; one = one.parentElement) opacity *= getComputedStyle(one).opacity;
      const [r, g, b, a] = rgba(element.closest("svg") ? style.fill : style.color);
      const under = behind(element);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const reached = ratio(over([r, g, b, a * opacity], under), under);
      if (reached < (large ? 3 : 4.5)) found.set(path(element), `${reached.toFixed(2)}: ${text.data.trim().slice(0, 40)}`);
    }
    return [...found].map(([where, what]) => `${where} ${what}`);
  }

  const paper = () => luminance(behind(document.body));

  // Nothing is wider than the window; what is scrolls in a box that has a name and that the keyboard reaches
  function width() {
    const root = document.scrollingElement;
    const found = root.scrollWidth > root.clientWidth ? [`the page is ${root.scrollWidth} wide in a window of ${root.clientWidth}`] : [];
    for (const one of document.querySelectorAll("body *")) {
      const style = getComputedStyle(one);
      if (!seen(one) || one.closest("svg") || one.scrollWidth <= one.clientWidth + 1 || style.display === "inline") continue;
      if (!["auto", "scroll"].includes(style.overflowX)) continue;
      const named = one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.localName === "pre";
      if (one.tabIndex < 0 || !named) found.push(`${path(one)} scrolls, but has no name or no place in the order of Tab`);
    }
    return found;
  }

  // Every picture is there, has a name, has marks in it, and nothing of it lies outside
  function pictures() {
    const found = [];
    for (const svg of document.querySelectorAll("svg")) {
      if (!seen(svg)) continue;
      const where = path(svg), box = svg.getBoundingClientRect();
      const name = (svg.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent).join("");
      if (svg.getAttribute("role") !== "img" || !name.trim()) found.push(`${where} has no name`);
      if (box.width < 200 || box.height < 40) found.push(`${where} is ${box.width} x ${box.height}`);
      const marks = [...svg.querySelectorAll("rect, circle, path, polyline, line")].filter((mark) => {
        const its = mark.getBoundingClientRect();
        return its.width + its.height > 0;
      });
      if (marks.length < 2) found.push(`${where} is empty`);
      if (/NaN|undefined|Infinity/.test(svg.outerHTML)) found.push(`${where} has places that are no numbers`);
      for (const one of [...marks, ...svg.querySelectorAll("text")]) {
        const its = one.getBoundingClientRect();
        const out = Math.max(box.left - its.left, its.right - box.right, box.top - its.top, its.bottom - box.bottom);
        if (out > 1.5 && its.width) found.push(`${path(one)} lies outside by ${out.toFixed(1)}: ${one.textContent}`);
      }
    }
    return found;
  }

  // No two texts of a picture on one another
  function overlaps() {
    const found = [];
    for (const svg of document.querySelectorAll("svg")) {
      if (!seen(svg)) continue;
      const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
      const boxes = texts.map((text) => text.getBoundingClientRect());
      texts.forEach((one, i) => {
        for (let j = i + 1; j < texts.length; j++) {
          const across = Math.min(boxes[i].right, boxes[j].right) - Math.max(boxes[i].left, boxes[j].left);
          const down = Math.min(boxes[i].bottom, boxes[j].bottom) - Math.max(boxes[i].top, boxes[j].top);
          if (across > 2 && down > 4) found.push(`${path(one)}: ${one.textContent} and ${texts[j].textContent}`);
        }
      });
    }
    return found;
  }

  // What takes part in the order of Tab, and what has it now: [where, whether it is seen that it has it]
  const stops = () => [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex]")]
    .filter((one) => one.tabIndex >= 0 && seen(one)).map(path);
  function focused() {
    const one = document.activeElement;
    if (!one || one === document.body) return null;
    const style = getComputedStyle(one), box = one.getBoundingClientRect();
    const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
    const clear = ratio(over(rgba(style.outlineColor), behind(one)), behind(one)) >= 3;
    const there = box.width > 0 && box.height > 0 && box.right > 0 && box.left < innerWidth && box.bottom > 0 && box.top < innerHeight;
    return [path(one), outlined && clear && there];
  }

  // Anything that could run, or fetch
  function dangers() {
    const found = [...document.querySelectorAll("script, iframe, object, embed, form, base, link, img, video, audio, image, foreignObject")].map(path);
    for (const one of document.querySelectorAll("*")) {
      for (const { name, value } of one.attributes) {
        if (/^on/i.test(name)) found.push(`${path(one)} ${name}`);
        if (/href|src|action|style/i.test(name) && /javascript:|data:|url\(|https?:/i.test(value)) found.push(`${path(one)} ${name}=${value}`);
      }
    }
    return found;
  }

  const open = () => document.querySelectorAll("details").forEach((one) => (one.open = true));
  const headings = () => [...document.querySelectorAll("h1, h2")].map((one) => one.textContent.trim());
  return { contrast, paper, width, pictures, overlaps, stops, focused, dangers, open, headings };
})();
