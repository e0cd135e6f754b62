// What the page shows before anybody has asked: a recording of the demo's model (serving/laptop.yaml), pass by pass.

export const prompt = "library: show the days and month of the top 1 loans with fee greater than 45 whose book has genre equal to 'travel' by days";

// Of each pass: text, accepted tokens, guesses for the tokens behind them.
const jacobi = [
  ["SELECT", 1, [" T", "1", ".", "mo", "nth", ",", "1", "1", ".", "mo", " FROM", " FROM", " loan", " AS", " T"]],
  [" T1.d", 4, ["nth", ",", " T", "1", ".", "mo", "nth", " FROM", " loan", " AS", " T", "1"]],
  ["ays", 1, [",", " T", "1", ".", "mo", "nth", " FROM", " loan", " AS", " T", "1", " JOIN", " book", " AS", " T"]],
  [", T1.month FROM loan AS T1 JOIN book AS T2", 16, []],
  [" ON", 1, [" T", "1", ".", "b", "ook", "_", "id", " =", " T", "2", ".", "id", " WHERE", " T", "1"]],
  [" T1.book_id = T2.id WHERE T1.", 16, []],
  ["f", 1, ["ee", " >", " 4", " 4", " AND", " AND", " T", "2", ".", ".", ".", " =", " '", "d", " BY"]],
  ["ee > 45", 4, [" AND", " T", " T", "2", ".", "genre", " =", " =", " '", "t", "ra", "'"]],
  [" AND T2", 3, [".", ".", "genre", " =", " '", "t", "t", "ra", "vel", " ORDER", " BY", " T", "1"]],
  [".genre", 2, [" =", " =", " '", "t", "ra", "'", "'", "'", " BY", " T", "1", ".", "d", "ays"]],
  [" = '", 2, ["t", "ra", "ra", "'", " ORDER", " ORDER", " BY", " T", "1", ".", "d", "ays", " DESC", "<|eos|>"]],
  ["travel", 3, ["'", " ORDER", " BY", " T", "1", "1", ".", "d", "ays", " DESC", " LIMIT", "<|eos|>", "<|eos|>"]],
  ["' ORDER BY T1.", 6, ["d", "d", "ays", " DESC", " LIMIT", " 1", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>"]],
  ["days", 2, ["ays", " DESC", " LIMIT", " 1", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>"]],
  [" DESC", 1, [" LIMIT", " LIMIT", " 1", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>"]],
  [" LIMIT 1", 2, [" 1", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>", "<|eos|>"]],
  ["", 1, []],
];

const ar = [
  "SELECT", " T", "1", ".", "d", "ays", ",", " T", "1", ".", "mo", "nth", " FROM", " loan", " AS", " T", "1",
  " JOIN", " book", " AS", " T", "2", " ON", " T", "1", ".", "b", "ook", "_", "id", " =", " T", "2", ".", "id",
  " WHERE", " T", "1", ".", "f", "ee", " >", " 4", "5", " AND", " T", "2", ".", "genre", " =", " '", "t", "ra",
  "vel", "'", " ORDER", " BY", " T", "1", ".", "d", "ays", " DESC", " LIMIT", " 1", "",
];

export const steps = {
  ar: ar.map((text) => ({ text, accepted: 1, guesses: [] })),
  jacobi: jacobi.map(([text, accepted, guesses]) => ({ text, accepted, guesses })),
};
