package baseline

import (
	"errors"
	"fmt"
	"strings"
)

// A file's names are bytes, of any kind. In a baseline's lines and in findings each byte that is no printable ASCII letter, or
// a space, is written as \x and two digits, and a backslash twice: so a name is one word, is what it looks like, and is
// written in one way whatever version of Unicode a program knows.

const hexDigits = "0123456789abcdef"

func plain(c byte) bool { return c > ' ' && c < 0x7f && c != '\\' }

func allPlain(s string) bool {
	for i := range len(s) {
		if !plain(s[i]) {
			return false
		}
	}
	return true
}

// appendEscaped appends bytes as one word, which is empty if there are none.
func appendEscaped(b []byte, s string) []byte {
	from := 0
	for i := range len(s) {
		c := s[i]
		if plain(c) {
			continue
		}
		b = append(b, s[from:i]...)
		from = i + 1
		if c == '\\' {
			b = append(b, `\\`...)
		} else {
			b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	return append(b, s[from:]...)
}

// Escape writes bytes, such as a path, as one printable word, as baselines and findings have it; [Unescape] reads it.
func Escape(s string) string {
	if allPlain(s) {
		return s
	}
	return string(appendEscaped(nil, s))
}

var errEscape = errors.New(`not as it is written: use \\ and \xff, the latter for all but printable ASCII`)

// Unescape reads what [Escape] wrote, and refuses what it would have written otherwise.
func Unescape(word string) (string, error) {
	if allPlain(word) {
		return word, nil
	}
	b := make([]byte, 0, len(word))
	for i := 0; i < len(word); {
		c, width := unescapeByte(word[i:])
		if width == 0 {
			return "", fmt.Errorf("byte %d: %w", i, errEscape)
		}
		b, i = append(b, c), i+width
	}
	return string(b), nil
}

// unescapeByte reads one byte; a width of 0 is a mistake.
func unescapeByte(w string) (c byte, width int) {
	switch {
	case plain(w[0]):
		return w[0], 1
	case w[0] != '\\' || len(w) < 2:
		return 0, 0
	case w[1] == '\\':
		return '\\', 2
	case w[1] != 'x' || len(w) < 4:
		return 0, 0
	}
	high, low := strings.IndexByte(hexDigits, w[2]), strings.IndexByte(hexDigits, w[3])
	if high < 0 || low < 0 {
		return 0, 0
	}
	c = byte(high<<4 | low)
	if plain(c) || c == '\\' {
		return 0, 0
	}
	return c, 4
}
