package state

import (
	"slices"
	"strings"

	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// maxToken leaves room for the longest path beside it in an event.
const maxToken = wire.MaxPayload - wire.MaxAbsPath - 2

func (c *core) watch(s *session, a logic.Action) (*watch, error) {
	for _, w := range s.watches {
		if w.path == a.Path && w.token == a.Token {
			return nil, tree.EEXIST
		}
	}
	if s.domain >= tree.FirstGuest && s.use.watches >= maxWatches {
		return nil, tree.ENOSPC
	}
	if len(a.Token) > maxToken {
		return nil, tree.E2BIG
	}
	w := &watch{s: s, path: a.Path, token: a.Token, shown: a.Shown(s.domain)}
	s.use.watches++
	s.watches = append(s.watches, w)
	c.watches[w.path] = append(c.watches[w.path], w)
	return w, nil
}

func (c *core) unwatch(w *watch) {
	is := func(o *watch) bool { return o == w }
	w.s.use.watches--
	w.s.watches = slices.DeleteFunc(w.s.watches, is)
	if l := slices.DeleteFunc(c.watches[w.path], is); len(l) > 0 {
		c.watches[w.path] = l
	} else {
		delete(c.watches, w.path)
	}
}

// fire tells every watch that a commit concerns: watches on a changed path or above it, and,
// where a subtree was removed, watches below it, with their own path.
func (c *core) fire(e *tree.Effects) {
	if len(c.watches) == 0 {
		return
	}
	tell := func(ws []*watch, at string) {
		for _, w := range ws {
			if e.Visible(w.s.domain, at) {
				c.emit(w.s, w.event(at))
			}
		}
	}
	for _, f := range e.Fired {
		tell(c.watches["/"], f.Path)
		for i := 1; i < len(f.Path); i++ {
			if f.Path[i] == '/' {
				tell(c.watches[f.Path[:i]], f.Path)
			}
		}
		if f.Path != "/" {
			tell(c.watches[f.Path], f.Path)
		}
		if f.Removed {
			for path, ws := range c.watches {
				if strings.HasPrefix(path, f.Path) && strings.HasPrefix(path[len(f.Path):], "/") {
					tell(ws, path)
				}
			}
		}
	}
}

func (c *core) fireSpecial(name string) {
	for _, w := range c.watches[name] {
		if c.tree.MayHear(w.s.domain, name) {
			c.emit(w.s, w.event(name))
		}
	}
}

// event names the changed path in the form the client used for its watch.
func (w *watch) event(at string) wire.Message {
	shown := at
	if w.shown != w.path {
		shown = w.shown + strings.TrimPrefix(at, w.path)
	}
	return wire.Message{Type: wire.WatchEvent, Payload: wire.Join(shown, w.token)}
}
