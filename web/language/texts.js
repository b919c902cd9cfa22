// @ts-check
// Texts of the page in the user's language. Imports nothing.
//
// English is the default and the key: under "braid" of locales/<language>/main.json stands what each
// text is in that language. Each is written out in its call, where a test finds it.

/** @type {Record<string, string>} */
let translations = {};

/** Take the texts of the user's language. @param {Record<string, string> | undefined} texts */
export function speak(texts) {
  translations = texts ?? {};
}

/**
 * A text in the user's language, with what stands in its {places}.
 * @param {string} text
 * @param {Record<string, any>} [values]
 */
export function words(text, values = {}) {
  const sentence = translations[text] ?? text;
  return sentence.replace(/\{(\w+)\}/g, (place, name) => (name in values ? said(values[name]) : place));
}

/** What the server sent for a reader: {text, values} of engine/texts.py, or a string as it is. */
export function said(sent) {
  return sent?.text ? words(sent.text, sent.values) : String(sent);
}
