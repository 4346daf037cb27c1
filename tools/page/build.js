// Bundles the libraries into engine/server/web/vendor: `npm ci && npm run build` in this folder.

import { build } from "esbuild";
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

const TARGET = "../../engine/server/web/vendor";
// Of KaTeX's fonts those that common mathematics is set in; the others fall back to them.
const FONTS = ["AMS-Regular", "Main-Italic", "Main-Regular", "Math-Italic", "Size1-Regular", "Size2-Regular",
  "Size3-Regular", "Size4-Regular"];
const PACKAGES = ["dompurify", "highlight.js", "katex", "marked"];

rmSync(TARGET, { recursive: true, force: true });
mkdirSync(`${TARGET}/fonts`, { recursive: true });

await build({
  entryPoints: ["libraries.js"],
  outfile: `${TARGET}/libraries.js`,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022"],
  legalComments: "none", // LICENSES.txt has them
  banner: { js: "// Made by tools/page/build.js; see LICENSES.txt." },
});

for (const font of FONTS) copyFileSync(`node_modules/katex/dist/fonts/KaTeX_${font}.woff2`, `${TARGET}/fonts/KaTeX_${font}.woff2`);
const faces = /@font-face\{[^}]*\}/g;
const css = readFileSync("node_modules/katex/dist/katex-swap.min.css", "utf8").replace(faces, (face) => {
  const [, font] = /fonts\/KaTeX_([\w-]+)\.woff2/.exec(face);
  return FONTS.includes(font) ? face.replace(/src:[^;}]*/, `src:url(fonts/KaTeX_${font}.woff2) format("woff2")`) : "";
});
writeFileSync(`${TARGET}/katex.css`, css);

const licences = PACKAGES.map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
  // Of two licences that may be chosen, Apache-2.0: its text is svdengine's own LICENSE, and need not be there twice.
  const apache = name === "dompurify" && `(c) Cure53 and other contributors\n\nApache License 2.0, whose text is that of the file LICENSE of svdengine.`;
  const text = apache || readFileSync(`${folder}/${file}`, "utf8").trim();
  return `${name} ${version}, ${license}\n${"-".repeat(60)}\n\n${text}\n`;
});
writeFileSync(`${TARGET}/LICENSES.txt`, `The chat page is bundled with these libraries.\n\n\n${licences.join("\n\n")}`);
